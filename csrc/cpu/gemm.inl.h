// Small matrix products on tiles that stay in the L1 and L2 caches:
//
//   C[m, n] (+)= sum_k A[m, k] B[k, n]
//
// A is a tile with a row stride known at compile time, read as it is or transposed. B is packed into panels of kPanel
// columns: panel p holds B[:, p kPanel : (p + 1) kPanel] row by row, so that the inner loop reads it from start to end.
// The last panel is one vector wide if that is enough. C has any row stride. Columns are padded to whole vectors and
// rows of A to an even number.
//
// Every element of C is the sum of its chains in order, one chain of multiply-adds for every kChain values of k,
// whichever block of the tile it is in.
//
// A and B hold numbers, or pairs of bfloat16: the values of two k side by side, whose products are added together.
// Depths and strides below count such elements.

// Row stride, in elements, of every tile used as A: an odd number of cache lines, so that the rows of a tile do not
// compete for the same cache sets, and longer than the longest row by the widest overread of a transposed block.
inline constexpr int kTileStride = 528;

// The bfloat16 values of two k.
struct Pair {
  int32_t bits;
};
inline constexpr bool kPairProducts = REVIT_BF16 != 0;

template <class E>
inline constexpr bool kIsPair = std::is_same_v<E, Pair>;
// The type of the sums of products of elements of type E.
template <class E>
using SumOf = std::conditional_t<kIsPair<E>, float, E>;
// Elements that hold n values.
template <class E>
REVIT_INLINE constexpr int64_t elements(int64_t n) {
  return kIsPair<E> ? (n + 1) / 2 : n;
}

template <class T>
inline constexpr int kPanel = 2 * kLanes<T>;

// Rows of C in a block. With two vectors of columns the block needs 2 * kBlockRows accumulators: twelve of sixteen
// registers, or twenty-four of the thirty-two that AVX-512 has.
inline constexpr int kBlockRows = REVIT_LANES == 16 ? 12 : 6;

REVIT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class F, int... I>
REVIT_INLINE void unroll_indices(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// Longest chain of multiply-adds. Its rounding errors grow with its length, and its part of a panel should fit into the
// L1 cache.
inline constexpr int64_t kChain = 128;

// Calls f(0), ..., f(n - 1) with compile-time arguments. With a loop GCC would keep an array that the loop indexes in
// memory, but the accumulators below must stay in registers.
template <int n, class F>
REVIT_INLINE void unroll(const F& f) {
  unroll_indices(f, std::make_integer_sequence<int, n>{});
}

// B in the form that the products read.
template <class T>
struct Panels {
  const T* data;
  int64_t stride;   // elements from panel to panel
  int64_t columns;  // a multiple of kLanes<T>

  int64_t width(int64_t first_column) const { return std::min<int64_t>(kPanel<T>, columns - first_column); }
  Panels from_column(int64_t first) const { return {data + first / kPanel<T> * stride, stride, columns - first}; }
};

template <int n>
REVIT_INLINE Vec<int32_t, n> load(const Pair* p) {
  Vec<int32_t, n> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class E, int n>
REVIT_INLINE auto broadcast_element(E element) {
  if constexpr (kIsPair<E>) {
    return broadcast<int32_t, n>(element.bits);
  } else {
    return broadcast<E, n>(element);
  }
}

// sum += a b.
template <class E, int n, class V>
REVIT_INLINE void add_product(Vec<SumOf<E>, n>& sum, V a, V b) {
#if REVIT_BF16
  if constexpr (kIsPair<E>) {
    sum = dot_pairs<n>(sum, a, b);
    return;
  }
#endif
  if constexpr (!kIsPair<E>) sum += a * b;
}

// Computes one block of C, of `rows` x `vectors` vectors.
template <class T, int rows, int vectors, bool transposed>
__attribute__((noinline)) void multiply_block(int64_t depth, const T* a, const T* b, SumOf<T>* c, int64_t c_stride,
                                              bool accumulate) {
  constexpr int n = kLanes<T>;
  Vec<SumOf<T>, n> sum[rows * vectors] = {};
  const auto step = [&]() __attribute__((always_inline)) {
    decltype(load<n>(b)) b_row[vectors];
    unroll<vectors>([&](auto j) __attribute__((always_inline)) { b_row[j] = load<n>(b + j * n); });
    unroll<rows>([&](auto i) __attribute__((always_inline)) {
      const auto factor = broadcast_element<T, n>(a[transposed ? i : i * kTileStride]);
      unroll<vectors>(
          [&](auto j) __attribute__((always_inline)) { add_product<T, n>(sum[i * vectors + j], factor, b_row[j]); });
    });
    a += transposed ? kTileStride : 1;
    b += vectors * n;
  };
  int64_t k = depth;
  for (; k >= 2; k -= 2) {
    step();
    step();
  }
  if (k > 0) step();
  unroll<rows>([&](auto i) __attribute__((always_inline)) {
    unroll<vectors>([&](auto j) __attribute__((always_inline)) {
      SumOf<T>* out = c + i * c_stride + j * n;
      store<n>(out, accumulate ? load<n>(out) + sum[i * vectors + j] : sum[i * vectors + j]);
    });
  });
}

// Computes `rows` rows of C with the smallest block that holds them; blocks have an even number of rows.
template <class T, int most, int vectors, bool transposed>
REVIT_INLINE void multiply_rows(int64_t rows, int64_t depth, const T* a, const T* b, SumOf<T>* c, int64_t c_stride,
                                bool accumulate) {
  if constexpr (most > 2) {
    if (rows <= most - 2) {
      return multiply_rows<T, most - 2, vectors, transposed>(rows, depth, a, b, c, c_stride, accumulate);
    }
  }
  multiply_block<T, most, vectors, transposed>(depth, a, b, c, c_stride, accumulate);
}

// C[0 : m, 0 : n] (+)= A B[first_k : first_k + depth, 0 : n]; A is a tile [m, depth], or [depth, m] if `transposed`.
// Writes C up to the next even row and the next panel.
template <class T, bool transposed = false>
void multiply(int64_t m, int64_t n, int64_t depth, const T* a, const Panels<T>& b, int64_t first_k, SumOf<T>* c,
              int64_t c_stride, bool accumulate) {
  for (int64_t column = 0; column < n; column += kPanel<T>) {
    const int64_t width = b.width(column);
    const T* panel = b.data + column / kPanel<T> * b.stride + first_k * width;
    for (int64_t k = 0; k < depth; k += kChain) {
      const int64_t chain = std::min(kChain, depth - k);
      const bool add = accumulate || k > 0;
      for (int64_t row = 0; row < m; row += kBlockRows) {
        const int64_t rows = std::min<int64_t>(kBlockRows, m - row);
        const T* a_block = a + (transposed ? row + k * kTileStride : row * kTileStride + k);
        SumOf<T>* c_block = c + row * c_stride + column;
        if (width == kPanel<T>) {
          multiply_rows<T, kBlockRows, 2, transposed>(rows, chain, a_block, panel + k * width, c_block, c_stride, add);
        } else {
          multiply_rows<T, kBlockRows, 1, transposed>(rows, chain, a_block, panel + k * width, c_block, c_stride, add);
        }
      }
    }
  }
}

// out[i] = factor * in[i] in the compute type for i < n, zero up to n_padded.
template <class T>
REVIT_INLINE void widen_row(const T* in, int64_t n, int64_t n_padded, Compute<T> factor, Compute<T>* out) {
  constexpr int lanes = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<lanes>(out + i, factor * load<lanes>(in + i));
  for (; i < n; ++i) out[i] = factor * widen(in[i]);
  for (; i < n_padded; ++i) out[i] = 0;
}

#if REVIT_BF16
// out[i] = factor * in[i], rounded to bfloat16, for i < n; zero up to n_padded, in pairs.
template <class T>
REVIT_INLINE void widen_row(const T* in, int64_t n, int64_t n_padded, float factor, Pair* out) {
  constexpr int lanes = kLanes<float>;
  BFloat16* values = reinterpret_cast<BFloat16*>(out);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_factors<lanes>(values + i, factor * load<lanes>(in + i));
  for (; i < n; ++i) narrow(factor * widen(in[i]), values + i);
  for (; i < 2 * n_padded; ++i) values[i] = {};
}
#endif

template <class T>
REVIT_INLINE void fill_row(T* out, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

// Packs a tile [rows, n] scaled by `factor`. An odd number of rows is made even with a row of zeros.
template <class T, class E>
void pack_tile(const T* in, int64_t stride, int64_t rows, int64_t n, Compute<T> factor, E* tile) {
  for (int64_t i = 0; i < rows; ++i) widen_row(in + i * stride, n, elements<E>(n), factor, tile + i * kTileStride);
  if (rows % 2) fill_row(tile + rows * kTileStride, elements<E>(n), E{});
}

// Number of elements in the panels of a matrix with `k` rows and `n` columns.
template <class T>
REVIT_INLINE int64_t panels_size(int64_t k, int64_t n) {
  return round_up(k, kLanes<T>) * round_up(n, kLanes<T>);
}

// B[k, n] = in[k, n].
template <class T>
Panels<Compute<T>> pack_panels(const T* in, int64_t stride, int64_t rows, int64_t n, Compute<T>* out) {
  using C = Compute<T>;
  const Panels<C> panels = {out, rows * kPanel<C>, round_up(n, kLanes<C>)};
  for (int64_t column = 0; column < n; column += kPanel<C>) {
    const int64_t width = panels.width(column), used = std::min(width, n - column);
    C* panel = out + column / kPanel<C> * panels.stride;
    for (int64_t i = 0; i < rows; ++i) widen_row(in + i * stride + column, used, width, C(1), panel + i * width);
  }
  return panels;
}

#if REVIT_BF16
// B[k, n] = (in[2 k, n], in[2 k + 1, n]), rounded to bfloat16.
template <class T>
Panels<Pair> pack_panels(const T* in, int64_t stride, int64_t rows, int64_t n, Pair* out) {
  constexpr int lanes = kLanes<Pair>;
  const int64_t n_pairs = elements<Pair>(rows);
  const Panels<Pair> panels = {out, n_pairs * kPanel<Pair>, round_up(n, lanes)};
  const auto rounded = [&](int64_t row, int64_t column, int64_t present) __attribute__((always_inline)) {
    BFloat16 values[lanes] = {};
    if (row < rows) {
      if (present == lanes) {
        store_factors<lanes>(values, load<lanes>(in + row * stride + column));
      } else {
        for (int64_t i = 0; i < present; ++i) narrow(widen(in[row * stride + column + i]), values + i);
      }
    }
    Vec<uint16_t, lanes> bits;
    __builtin_memcpy(&bits, values, sizeof(bits));
    return __builtin_convertvector(bits, Vec<int32_t, lanes>);
  };
  for (int64_t column = 0; column < n; column += lanes) {
    const int64_t first = column / kPanel<Pair> * kPanel<Pair>, width = panels.width(first);
    const int64_t present = std::min<int64_t>(lanes, n - column);
    Pair* panel = out + first / kPanel<Pair> * panels.stride + (column - first);
    for (int64_t k = 0; k < n_pairs; ++k) {
      const Vec<int32_t, lanes> pairs = rounded(2 * k, column, present) | rounded(2 * k + 1, column, present) << 16;
      __builtin_memcpy(panel + k * width, &pairs, sizeof(pairs));
    }
  }
  return panels;
}
#endif

// Interleaves the lower (half = 0) or upper (half = 1) lanes of a and b.
template <class T, int half, int... I>
REVIT_INLINE Vec<T, sizeof...(I)> interleave(Vec<T, sizeof...(I)> a, Vec<T, sizeof...(I)> b,
                                             std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 * n + I / 2 + half * (n / 2))...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Index, n>{(I % 2 * n + I / 2 + half * (n / 2))...});
#endif
}

// Transposes n rows of n lanes: log2(n) times, row i is interleaved with row i + n / 2.
template <class T, int n, int rounds>
REVIT_INLINE void transpose(const Vec<T, n>* in, Vec<T, n>* out) {
  if constexpr (rounds == 0) {
    unroll<n>([&](auto i) __attribute__((always_inline)) { out[i] = in[i]; });
  } else {
    Vec<T, n> mixed[n];
    unroll<n / 2>([&](auto i) __attribute__((always_inline)) {
      mixed[2 * i] = interleave<T, 0>(in[i], in[i + n / 2], std::make_integer_sequence<int, n>{});
      mixed[2 * i + 1] = interleave<T, 1>(in[i], in[i + n / 2], std::make_integer_sequence<int, n>{});
    });
    transpose<T, n, rounds / 2>(mixed, out);
  }
}

// Longest row that pack_transposed accepts.
inline constexpr int kMaxDepth = 256;

// B[k, n] = in[n, k], n < columns, k < depth; or pairs of them.
template <class T, class C>
Panels<C> pack_transposed(const T* in, int64_t stride, int64_t columns, int64_t depth, C* out) {
  using Bits = SumOf<C>;  // pairs are moved as floats
  constexpr int lanes = kLanes<C>;
  const int64_t padded_depth = round_up(elements<C>(depth), lanes);
  const Panels<C> panels = {out, padded_depth * kPanel<C>, round_up(columns, lanes)};
  alignas(64) C staged[lanes * kMaxDepth];
  for (int64_t column = 0; column < columns; column += lanes) {
    const int64_t first = column / kPanel<C> * kPanel<C>, width = panels.width(first);
    const C* rows = staged;
    int64_t rows_stride = kMaxDepth;
    const int64_t present = std::min<int64_t>(lanes, columns - column);
    bool direct = false;
    if constexpr (std::is_same_v<T, C>) {
      direct = present == lanes && depth == padded_depth;
      if (direct) {
        rows = in + column * stride;
        rows_stride = stride;
      }
    }
    if (!direct) {
      for (int64_t i = 0; i < lanes; ++i) {
        const bool exists = i < present;
        widen_row(in + (exists ? column + i : 0) * stride, exists ? depth : 0, padded_depth, Compute<T>(1),
                  staged + i * kMaxDepth);
      }
    }
    C* panel = out + first / kPanel<C> * panels.stride + (column - first);
    for (int64_t k = 0; k < padded_depth; k += lanes) {
      Vec<Bits, lanes> block[lanes], columns_of_block[lanes];
      unroll<lanes>([&](auto i) __attribute__((always_inline)) {
        __builtin_memcpy(&block[i], rows + i * rows_stride + k, sizeof(block[i]));
      });
      transpose<Bits, lanes, lanes / 2>(block, columns_of_block);
      unroll<lanes>([&](auto i) __attribute__((always_inline)) {
        __builtin_memcpy(panel + (k + i) * width, &columns_of_block[i], sizeof(columns_of_block[i]));
      });
    }
  }
  return panels;
}

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Arrays of T in the thread's scratch memory; each starts on a new cache line.
template <class T, size_t n>
struct Arrays {
  T* array[n];

  explicit Arrays(const int64_t (&sizes)[n]) {
    int64_t offset[n], total = 0;
    for (size_t i = 0; i < n; ++i) {
      offset[i] = total;
      total += round_up(sizes[i], 64 / sizeof(T));
    }
    T* base = reinterpret_cast<T*>(thread_scratch().reserve(total * sizeof(T)));
    for (size_t i = 0; i < n; ++i) array[i] = base + offset[i];
  }
};
