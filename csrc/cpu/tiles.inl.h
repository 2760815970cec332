// Products on the tiles of AMX: registers of 16 rows of 64 bytes. A block has 32 rows and a panel of 32 columns, so
// four tiles of sums. Two tiles hold its rows and two the weights, 32 depths of bfloat16 or 64 of int8 at a time.
//
// The sum of a chain of bfloat16 differs from that of dot_pairs: the products of even and of odd depths are added
// apart, in 16 steps from zero, then to each other, then to the sum.

#if REVIT_AMX == REVIT_NATIVE
// Configures the tiles of this thread, and gives them back.
struct TileSession {
  TileSession() {
    alignas(64) uint8_t config[64] = {1};  // the palette
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;     // bytes of a row
      config[48 + t] = kTileRows;  // rows
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileSession() { asm volatile("tilerelease"); }
};

// The registers by number.
struct Tiles {
  template <int t>
  REVIT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  // Rows are `stride` bytes apart.
  template <int t>
  REVIT_INLINE void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(rows), "r"(stride) : "memory");
  }
  template <int t>
  REVIT_INLINE void store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(rows), "r"(stride) : "memory");
  }
  // Tile c += a b, of pairs of bfloat16, or of four bytes, those of a unsigned.
  template <class W, int c, int a, int b>
  REVIT_INLINE void multiply() {
    if constexpr (kInteger<W>) {
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
    } else {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
    }
  }
};
#else
struct TileSession {
  TileSession() {}  // not trivial, as the other
};

// The same in portable vectors, by the definitions of Intel's manual.
struct Tiles {
  using Row = Vec<int32_t, 16>;
  Row tile[8][kTileRows];

  template <int t>
  void zero() {
    for (Row& row : tile[t]) row = Row{};
  }
  template <int t>
  void load(const void* rows, int64_t stride) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      __builtin_memcpy(&tile[t][i], static_cast<const char*>(rows) + i * stride, sizeof(Row));
    }
  }
  template <int t>
  void store(void* rows, int64_t stride) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      __builtin_memcpy(static_cast<char*>(rows) + i * stride, &tile[t][i], sizeof(Row));
    }
  }
  template <class W, int c, int a, int b>
  void multiply() {
    for (int64_t i = 0; i < kTileRows; ++i) {
      if constexpr (kInteger<W>) {
        for (int k = 0; k < 16; ++k) {
          tile[c][i] = dot_quads<16>(tile[c][i], broadcast<int32_t, 16>(tile[a][i][k]), tile[b][k]);
        }
      } else {
        constexpr int32_t kUpper = static_cast<int32_t>(0xffff0000);
        const auto flush = [](Vec<float, 16> v) { return flushed<16>(reinterpret_cast<Row>(v)); };
        Vec<float, 16> even = {}, odd = {};
        for (int k = 0; k < 16; ++k) {  // with one half zero, dot_pairs is one multiply-add
          const Row factor = broadcast<int32_t, 16>(tile[a][i][k]), other = tile[b][k];
          even = dot_pairs<16>(even, factor & 0xffff, other & 0xffff);
          odd = dot_pairs<16>(odd, factor & kUpper, other & kUpper);
        }
        tile[c][i] = reinterpret_cast<Row>(flush(flushed<16>(tile[c][i]) + flush(even + odd)));
      }
    }
  }
};
#endif

template <class W, Chain kind>
__attribute__((noinline)) void multiply_tiles(const BlockArgs<W>& args, int64_t n_rows) {
  static_assert(kLinearPanel == 32);
  constexpr int n = kLanes<float>;
  alignas(64) LinearSum<W> sums[2 * kTileRows][kLinearPanel];
  const int64_t a_stride = args.a.stride * static_cast<int64_t>(sizeof(float)), b_stride = kLinearPanel * 4;
  const char* a = reinterpret_cast<const char*>(args.a.data);
  const char* b = static_cast<const char*>(args.b);
  const bool two = n_rows > kTileRows;
  Tiles tiles;
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t k = 0; k < args.depth; k += kDepthUnit<W>, a += 64, b += 16 * b_stride) {
    tiles.load<4>(a, a_stride);
    tiles.load<6>(b, b_stride);
    tiles.load<7>(b + 64, b_stride);
    tiles.template multiply<W, 0, 4, 6>();
    tiles.template multiply<W, 1, 4, 7>();
    if (two) {
      tiles.load<5>(a + kTileRows * a_stride, a_stride);
      tiles.template multiply<W, 2, 5, 6>();
      tiles.template multiply<W, 3, 5, 7>();
    }
  }
  tiles.store<0>(sums[0], sizeof(sums[0]));
  tiles.store<1>(sums[0] + 16, sizeof(sums[0]));
  tiles.store<2>(sums[kTileRows], sizeof(sums[0]));
  tiles.store<3>(sums[kTileRows] + 16, sizeof(sums[0]));
  BlockArgs<W> row = args;
  for (int64_t i = 0; i < n_rows; ++i) {
    Vec<LinearSum<W>, n> sum[2];
    __builtin_memcpy(sum, sums[i], sizeof(sum));
    finish_chain<W, 1, kind>(row, sum);
    row.a.advance(1);
    row.partial += kLinearPanel;
    row.out += row.out_stride;
  }
}
