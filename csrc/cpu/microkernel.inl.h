// The products of linear layers: one chain of a panel for a block of rows.
//
// The sum over the depth is cut into equal chains of at most kMaxChain, so that a chain of a panel stays in the L1
// cache while all rows of a tile pass over it. Every output is the sum of its chains in order, and each chain is one
// sequence of multiply-adds. So an output has the same bits whatever the tile, its height and its place.
//
// With an int8 weight a chain is summed exactly, in integers. Its rows were rounded to integers with one scale per
// chain (see quantize.inl.h). The finished sum is converted to float and multiplied by the scales of row and column.
//
// With a bfloat16 weight, and where the instruction set multiplies bfloat16, the rows are rounded to bfloat16 too; sums
// are in float. Elsewhere the weight is widened when it is read.

// Rows of a block. With two vectors of columns a block needs twelve of sixteen registers as accumulators, or
// twenty-four of the thirty-two that AVX-512 has.
inline constexpr int kLinearRows = kBlockRows;
inline constexpr int kHalfBlock = kLinearRows / 2;
inline constexpr int64_t kLinearPanel = kPanel<float>;

// Whether products with W are computed on tiles of AMX: all narrow types, or none.
template <class W>
inline constexpr bool kTiles = REVIT_AMX != 0 && !std::is_same_v<W, float>;
inline constexpr int64_t kTileRows = 16;
// Most rows of a block.
template <class W>
inline constexpr int64_t kRowsOf = kTiles<W> ? 2 * kTileRows : kLinearRows;

inline constexpr int64_t kMaxChain = 256;

template <class W>
inline constexpr bool kInteger = std::is_same_v<W, int8_t>;
template <class W>
inline constexpr bool kRounded = REVIT_BF16 != 0 && std::is_same_v<W, BFloat16>;
// Rows are rounded before the product, to lanes of several depths.
template <class W>
inline constexpr bool kLaneRows = kInteger<W> || kRounded<W>;
// Depths of a weight in a lane.
template <class W>
inline constexpr int kDepths = std::is_same_v<W, float> ? 1
                               : kInteger<W>            ? kIntegerDepths
                                                        : 2;
// Depths of one step of the inner loop.
template <class W>
inline constexpr int kStep = std::max(kDepths<W>, 2);

// A column of a panel is a multiple of this many depths: whole cache lines of the narrow types, which are rows of the
// tiles of AMX.
template <class W>
inline constexpr int64_t kDepthUnit = std::is_same_v<W, float> ? 1 : 64 / sizeof(W);

// Depth of every chain except the last. It is a multiple of the panel, so that the chains of a layer are the chunks of
// columns in which the layer before it is computed.
template <class W>
REVIT_INLINE int64_t chain_of(int64_t depth) {
  constexpr int64_t unit = kInteger<W> ? kIntegerChainUnit : std::max(kLinearPanel, kDepthUnit<W>);
  static_assert(unit % kLinearPanel == 0 && unit % kDepthUnit<W> == 0);
  return chain_depth(depth, kInteger<W> ? kMaxIntegerChain : kMaxChain, unit);
}

// Elements of W in `depth` rows of a panel.
template <class W>
REVIT_INLINE int64_t panel_size(int64_t depth) {
  return round_up(depth, kDepthUnit<W>) * kLinearPanel;
}

// One 32-bit lane holds the bfloat16 values of two depths.
template <int n>
REVIT_INLINE Vec<float, n> load_even(const BFloat16* p) {
  Vec<uint32_t, n> bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  bits = bits << 16;
  Vec<float, n> even;
  __builtin_memcpy(&even, &bits, sizeof(even));
  return even;
}

template <int n>
REVIT_INLINE Vec<float, n> load_odd(const BFloat16* p) {
  Vec<uint32_t, n> bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
#if REVIT_LANES == 8
  // A mask would take one of the sixteen registers, and GCC would spill sums. The asm stops GCC from replacing the two
  // shifts by a mask.
  bits = bits >> 16;
  asm("" : "+x"(bits));
  bits = bits << 16;
#else
  bits = bits & 0xffff0000u;
#endif
  Vec<float, n> odd;
  __builtin_memcpy(&odd, &bits, sizeof(odd));
  return odd;
}

// Every lane holds the int8 values of kIntegerDepths depths, widened where that is two.
template <int n>
REVIT_INLINE Vec<int32_t, n> load_lanes(const int8_t* p) {
  Vec<int32_t, n> lanes;
#if REVIT_VNNI
  __builtin_memcpy(&lanes, p, sizeof(lanes));
#else
  // In the general case below, the compiler widens the two halves separately.
  #if REVIT_AVX512
  if constexpr (n == 16) {
    return reinterpret_cast<Vec<int32_t, n> >(
        _mm512_maskz_cvtepi8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  #elif REVIT_F16C
  if constexpr (n == 8) {
    return reinterpret_cast<Vec<int32_t, n> >(
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  #endif
  Vec<int8_t, 2 * n> narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  const auto wide = __builtin_convertvector(narrow, Vec<int16_t, 2 * n>);
  __builtin_memcpy(&lanes, &wide, sizeof(lanes));
#endif
  return lanes;
}

// Every lane holds the bfloat16 values of two depths.
template <int n>
REVIT_INLINE Vec<int32_t, n> load_lanes(const BFloat16* p) {
  Vec<int32_t, n> lanes;
  __builtin_memcpy(&lanes, p, sizeof(lanes));
  return lanes;
}

// Rows of A as multiply_weights reads them.
struct FloatRows {
  const float* data;
  int64_t stride;

  REVIT_INLINE void advance(int64_t rows) { data += rows * stride; }
  REVIT_INLINE FloatRows from_depth(int64_t k) const { return {data + k, stride}; }
};
template <class W>
struct FactorsOf {
  using type = FloatRows;
};
template <>
struct FactorsOf<int8_t> {
  using type = QuantizedRows;
};
#if REVIT_BF16
template <>
struct FactorsOf<BFloat16> {
  using type = RoundedRows;
};
#endif
template <class W>
using Factors = typename FactorsOf<W>::type;

// Of a panel's columns; only int8 weights have them.
template <class W>
struct ColumnArgs {};
template <>
struct ColumnArgs<int8_t> {
  const float* column_scales;
  const float* column_offsets;  // of this chain; see PackedWeight
};

template <class W>
struct BlockArgs : ColumnArgs<W> {
  int64_t depth;
  Factors<W> a;
  const void* b;       // depth rows of a panel
  float* partial;      // [rows][panel], sums of the earlier chains; the last chain does not update them
  bool first;          // whether this is the first chain
  const char* ahead;   // this block's share of the next chain, which is prefetched
  int64_t ahead_step;  // bytes of it to prefetch with every step
  const float* bias;   // bias of the panel; used by the last chain
  float* out;          // written by the last chain
  int64_t out_stride;
};

enum class Chain { kInner, kStore, kAdd, kMultiply };  // not the last; or the last, with what is done to `out`

template <class W>
using LinearSum = std::conditional_t<kInteger<W>, int32_t, float>;

// Adds the finished sums of a chain, two vectors for every row, to those of the earlier chains, or finishes the block.
template <class W, int rows, Chain kind, class Sums>
REVIT_INLINE void finish_chain(const BlockArgs<W>& args, const Sums& sum) {
  constexpr int n = kLanes<float>;
  using V = Vec<float, n>;
  V total[2 * rows];
  if constexpr (kInteger<W>) {
    const V column_scales[] = {load<n>(args.column_scales), load<n>(args.column_scales + n)};
    V offsets[2] = {};
    if constexpr (kIntegerZero != 0) {
      offsets[0] = load<n>(args.column_offsets);
      offsets[1] = load<n>(args.column_offsets + n);
    }
    unroll<2 * rows>([&](auto i) __attribute__((always_inline)) {
      const float row_scale = args.a.scales[i / 2 * args.a.stride];
      V wide = __builtin_convertvector(sum[i], V);
      if constexpr (kIntegerZero != 0) wide += offsets[i % 2];
      total[i] = wide * column_scales[i % 2] * row_scale;
    });
  } else {
    unroll<2 * rows>([&](auto i) __attribute__((always_inline)) { total[i] = sum[i]; });
  }
  if (!args.first) {
    unroll<2 * rows>([&](auto i)
                         __attribute__((always_inline)) { total[i] = load<n>(args.partial + i * n) + total[i]; });
  }
  if constexpr (kind == Chain::kInner) {
    unroll<2 * rows>([&](auto i) __attribute__((always_inline)) { store<n>(args.partial + i * n, total[i]); });
  } else {
    const V bias0 = load<n>(args.bias), bias1 = load<n>(args.bias + n);
    unroll<rows>([&](auto i) __attribute__((always_inline)) {
      float* out = args.out + i * args.out_stride;
      V v0 = total[2 * i] + bias0, v1 = total[2 * i + 1] + bias1;
      if constexpr (kind == Chain::kAdd) {
        v0 = load<n>(out) + v0;
        v1 = load<n>(out + n) + v1;
      }
      if constexpr (kind == Chain::kMultiply) {
        v0 = load<n>(out) * v0;
        v1 = load<n>(out + n) * v1;
      }
      store<n>(out, v0);
      store<n>(out + n, v1);
    });
  }
}

template <class W, int rows, Chain kind>
__attribute__((noinline)) void multiply_weights(const BlockArgs<W>& args) {
  constexpr int n = kLanes<float>;
  using Element = std::conditional_t<kLaneRows<W>, int32_t, float>;  // of a row
  Vec<LinearSum<W>, n> sum[2 * rows] = {};
  const int64_t stride = args.a.stride;
  // Every third row has a base pointer, because an address can add one or two strides to a base, and no more.
  constexpr int kBases = rows / 3;
  const Element* base[kBases];
  unroll<kBases>([&](auto g) __attribute__((always_inline)) { base[g] = args.a.data + 3 * g * stride; });
  const auto advance = [&](int elements) __attribute__((always_inline)) {
    unroll<kBases>([&](auto g) __attribute__((always_inline)) { base[g] += elements; });
  };
  const auto add_product = [](auto& sum, auto factor, auto b) __attribute__((always_inline)) {
    if constexpr (kInteger<W>) {
#if REVIT_VNNI
      sum = dot_quads<n>(sum, factor, b);
#else
      sum += multiply_pairs<n>(factor, b);
#endif
#if REVIT_BF16
    } else if constexpr (kRounded<W>) {
      sum = dot_pairs<n>(sum, factor, b);
#endif
    } else {
      sum += factor * b;
    }
  };
  const auto add = [&](int k, auto b0, auto b1) __attribute__((always_inline)) {
    unroll<rows>([&](auto i) __attribute__((always_inline)) {
      const auto factor = broadcast<Element, n>(base[i / 3][i % 3 * stride + k]);
      add_product(sum[2 * i], factor, b0);
      add_product(sum[2 * i + 1], factor, b1);
    });
  };
  if constexpr (kind == Chain::kAdd) {
    // Prefetched now, the outputs are in the cache when the sums are done. This tile may be the first to read them.
    unroll<rows>([&](auto i) __attribute__((always_inline)) {
      for (int64_t j = 0; j < kLinearPanel; j += 64 / int64_t{sizeof(float)}) {
        __builtin_prefetch(args.out + i * args.out_stride + j);
      }
    });
  }
  const W* b = static_cast<const W*>(args.b);
  const char* ahead = args.ahead;
  int64_t k = args.depth;
  if constexpr (std::is_same_v<W, float>) {
    // Two depths per step: GCC 12 then keeps all sums in registers. With four it spills two of them.
    for (; k >= 2; k -= 2) {
      add(0, load<n>(b), load<n>(b + n));
      add(1, load<n>(b + 2 * n), load<n>(b + 3 * n));
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_step;
      advance(2);
      b += 4 * n;
    }
    if (k > 0) add(0, load<n>(b), load<n>(b + n));
  } else if constexpr (kLaneRows<W>) {
    // One lane per step: with more, GCC adds the integer products of a row first and spills sums for them.
    for (; k > 0; k -= kStep<W>) {
      add(0, load_lanes<n>(b), load_lanes<n>(b + kDepths<W> * n));
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_step;
      advance(1);
      b += 2 * kDepths<W> * n;
    }
  } else {
    for (; k >= 2; k -= 2) {
      add(0, load_even<n>(b), load_even<n>(b + 2 * n));
      // Makes GCC read the weights again instead of keeping them in registers.
      asm volatile("" : "+r"(b) : : "memory");
      add(1, load_odd<n>(b), load_odd<n>(b + 2 * n));
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_step;
      advance(2);
      b += 4 * n;
    }
    if (k > 0) add(0, load_even<n>(b), load_even<n>(b + 2 * n));
  }
  finish_chain<W, rows, kind>(args, sum);
}
