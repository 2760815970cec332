// Linear layers on packed weights (see linear.h).
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

inline constexpr int64_t kMaxChain = 256;

template <class W>
inline constexpr bool kInteger = std::is_same_v<W, int8_t>;
template <class W>
inline constexpr bool kRounded = REVIT_BF16 != 0 && std::is_same_v<W, BFloat16>;
// Rows are rounded to pairs of 16 bits before the product.
template <class W>
inline constexpr bool kPairs = kInteger<W> || kRounded<W>;

// Depth of every chain except the last. It is a multiple of the panel, so that the chains of a layer are the chunks of
// columns in which the layer before it is computed.
template <class W>
REVIT_INLINE int64_t chain_of(int64_t depth) {
  constexpr int64_t most = kInteger<W> ? kMaxIntegerChain : kMaxChain;
  constexpr int64_t unit = kInteger<W> ? kIntegerChainUnit : kLinearPanel;
  static_assert(unit % kLinearPanel == 0);
  const int64_t n_chains = std::max<int64_t>(1, (depth + most - 1) / most);
  return round_up((depth + n_chains - 1) / n_chains, unit);
}

// Elements of W in `depth` rows of a panel.
template <class W>
REVIT_INLINE int64_t panel_size(int64_t depth) {
  return (std::is_same_v<W, float> ? depth : round_up(depth, 2)) * kLinearPanel;
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

// Every lane holds the int8 values of two depths, widened.
template <int n>
REVIT_INLINE Vec<int32_t, n> load_pairs(const int8_t* p) {
  // In the general case below, the compiler widens the two halves separately.
#if REVIT_AVX512
  if constexpr (n == 16) {
    return reinterpret_cast<Vec<int32_t, n>>(
        _mm512_maskz_cvtepi8_epi16(~0u, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
#elif REVIT_F16C
  if constexpr (n == 8) {
    return reinterpret_cast<Vec<int32_t, n>>(
        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#endif
  Vec<int8_t, 2 * n> narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  const auto wide = __builtin_convertvector(narrow, Vec<int16_t, 2 * n>);
  Vec<int32_t, n> pairs;
  __builtin_memcpy(&pairs, &wide, sizeof(pairs));
  return pairs;
}

// Every lane holds the bfloat16 values of two depths.
template <int n>
REVIT_INLINE Vec<int32_t, n> load_pairs(const BFloat16* p) {
  Vec<int32_t, n> pairs;
  __builtin_memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}

// x Phi(x), computed as max(x, 0) - |x| Phi(-|x|). The last term is a small bump. A polynomial of degree 17 fits it to
// 3e-8 on [0, 5.4]; beyond that it is less than 2e-7. The absolute error is below 3e-7, and that of
// 0.5 x (1 + erf(x / sqrt 2)) in float is 4.5e-7. The fit is ours: reweighted least squares in u = |x| / 2.7 - 1, which
// keeps its coefficients small.
template <int n>
REVIT_INLINE Vec<float, n> gelu(Vec<float, n> x) {
  constexpr float kBump[] = {0.00936084799f, -0.0666081831f, 0.200933859f,  -0.303650826f,  0.141171247f,
                             0.303965509f,   -0.612622797f,  0.373131424f,  0.206523091f,   -0.481433451f,
                             0.193353355f,   0.200370669f,   -0.208989501f, -0.0136729842f, 0.0839947984f,
                             -0.0165601559f, -0.0137248542f, 0.00445809634f};
  const Vec<float, n> zero = {}, limit = broadcast<float, n>(5.4f);
  Vec<float, n> u = x < zero ? -x : x;
  u = (u < limit ? u : limit) * (1.0f / 2.7f) - 1.0f;
  Vec<float, n> bump = broadcast<float, n>(kBump[17]);
  unroll<17>([&](auto i) __attribute__((always_inline)) { bump = bump * u + kBump[16 - i]; });
  return (x < zero ? zero : x) - bump;
}

// 1 / (1 + e^-x), computed from e^-|x| so that nothing overflows.
template <int n>
REVIT_INLINE Vec<float, n> sigmoid(Vec<float, n> x) {
  const Vec<float, n> zero = {};
  const Vec<float, n> e = exp2_nonpositive<float, n>(static_cast<float>(kLog2E) * (x < zero ? x : -x));
  return (x < zero ? e : broadcast<float, n>(1.0f)) / (1.0f + e);
}

template <Activation activation, int n>
REVIT_INLINE Vec<float, n> activate(Vec<float, n> x) {
  const Vec<float, n> zero = {};
  if constexpr (activation == Activation::kGelu) return gelu<n>(x);
  if constexpr (activation == Activation::kGeluTanh) {  // tanh(u) = 2 sigmoid(2 u) - 1
    return x * sigmoid<n>(1.5957691216057308f * (x + 0.044715f * x * x * x));
  }
  if constexpr (activation == Activation::kSilu) return x * sigmoid<n>(x);
  if constexpr (activation == Activation::kRelu) return x < zero ? zero : x;
  if constexpr (activation == Activation::kQuickGelu) return x * sigmoid<n>(1.702f * x);
  return x;
}

// Three rows at a time. A polynomial is a long chain of dependent steps; those of three rows overlap and share their
// constants.
template <Activation activation, int rows>
__attribute__((noinline)) void activate_rows(float* out, int64_t stride) {
  constexpr int n = kLanes<float>, kTogether = 3;
  static_assert(rows % kTogether == 0);
  for (int i = 0; i < rows; i += kTogether) {
    Vec<float, n> v[2 * kTogether];
    unroll<2 * kTogether>(
        [&](auto j) __attribute__((always_inline)) { v[j] = load<n>(out + (i + j / 2) * stride + j % 2 * n); });
    unroll<2 * kTogether>([&](auto j) __attribute__((always_inline)) { v[j] = activate<activation, n>(v[j]); });
    unroll<2 * kTogether>(
        [&](auto j) __attribute__((always_inline)) { store<n>(out + (i + j / 2) * stride + j % 2 * n, v[j]); });
  }
}

template <int rows>
REVIT_INLINE void activate_block(Activation activation, float* out, int64_t stride) {
  switch (activation) {
    case Activation::kGelu:
      return activate_rows<Activation::kGelu, rows>(out, stride);
    case Activation::kGeluTanh:
      return activate_rows<Activation::kGeluTanh, rows>(out, stride);
    case Activation::kSilu:
      return activate_rows<Activation::kSilu, rows>(out, stride);
    case Activation::kRelu:
      return activate_rows<Activation::kRelu, rows>(out, stride);
    case Activation::kQuickGelu:
      return activate_rows<Activation::kQuickGelu, rows>(out, stride);
    default:
      return;
  }
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

// Scales of a panel's columns; only int8 weights have them.
template <class W>
struct ColumnScales {};
template <>
struct ColumnScales<int8_t> {
  const float* column_scales;
};

template <class W>
struct BlockArgs : ColumnScales<W> {
  int64_t depth;
  Factors<W> a;
  const void* b;       // depth rows of a panel
  float* partial;      // [rows][panel], sums of the earlier chains; the last chain does not update them
  bool first;          // whether this is the first chain
  const char* ahead;   // this block's share of the next chain, which is prefetched
  int64_t ahead_step;  // bytes of it to prefetch with every two depths
  const float* bias;   // bias of the panel; used by the last chain
  float* out;          // written by the last chain
  int64_t out_stride;
};

enum class Chain { kInner, kStore, kAdd };  // not the last; the last, stored; the last, added to `out`

template <class W, int rows, Chain kind>
__attribute__((noinline)) void multiply_weights(const BlockArgs<W>& args) {
  constexpr int n = kLanes<float>;
  using V = Vec<float, n>;
  using Element = std::conditional_t<kPairs<W>, int32_t, float>;  // of a row
  using Sum = std::conditional_t<kInteger<W>, int32_t, float>;
  Vec<Sum, n> sum[2 * rows] = {};
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
      sum += multiply_pairs<n>(factor, b);
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
  } else if constexpr (kPairs<W>) {
    // Two depths per step: with more, GCC adds the integer products of a row first and spills sums for them.
    for (; k > 0; k -= 2) {
      add(0, load_pairs<n>(b), load_pairs<n>(b + 2 * n));
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_step;
      advance(1);
      b += 4 * n;
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
  V total[2 * rows];
  if constexpr (kInteger<W>) {
    const V column_scales[] = {load<n>(args.column_scales), load<n>(args.column_scales + n)};
    unroll<2 * rows>([&](auto i) __attribute__((always_inline)) {
      const float row_scale = args.a.scales[i / 2 * stride];
      total[i] = __builtin_convertvector(sum[i], V) * column_scales[i % 2] * row_scale;
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
      store<n>(out, v0);
      store<n>(out + n, v1);
    });
  }
}

template <class W, int rows>
REVIT_INLINE void finish_block(const BlockArgs<W>& args, bool last, Finish finish, Activation activation) {
  if (!last) return multiply_weights<W, rows, Chain::kInner>(args);
  if (finish == Finish::kAdd) return multiply_weights<W, rows, Chain::kAdd>(args);
  multiply_weights<W, rows, Chain::kStore>(args);
  if (finish == Finish::kActivate) activate_block<rows>(activation, args.out, args.out_stride);
}

// Computes the chains [first_k, end_k) of `tile`; if `end_k` is not the whole depth, a later call continues. `partial`
// keeps [n_panels][rows, whole half blocks][panel] sums from one call to the next, or those of one panel if one call
// does everything. `a` holds the rows of the tile, from depth first_k on.
template <class W>
void linear_chains(const LinearTile& tile, const Factors<W>& a, int64_t first_k, int64_t end_k, float* partial,
                   int64_t partial_stride) {
  const int64_t depth = tile.weight.depth, chain = chain_of<W>(depth);
  const W* panels = static_cast<const W*>(tile.weight.panels);
  for (int64_t p = tile.first_panel; p < tile.end_panel; ++p) {
    const W* panel = panels + p * panel_size<W>(depth);
    float* sums = partial + (p - tile.first_panel) * partial_stride;
    float* out = tile.out + (p - tile.first_panel) * kLinearPanel;
    for (int64_t k = first_k; k < end_k; k += chain) {
      BlockArgs<W> args = {{},
                           std::min(chain, depth - k),
                           a.from_depth(k - first_k),
                           panel + panel_size<W>(k),
                           sums,
                           k == 0,
                           nullptr,
                           0,
                           tile.weight.bias + p * kLinearPanel,
                           out,
                           tile.out_stride};
      if constexpr (kInteger<W>) args.column_scales = tile.weight.scales + p * kLinearPanel;
      const bool last = k + args.depth == depth;
      // Every tile reads the weights once, from beyond the L2 cache. While a chain is multiplied, the next one in
      // memory is prefetched; each block of rows prefetches a share.
      args.ahead = reinterpret_cast<const char*>(panel + panel_size<W>(k + args.depth));
      args.ahead_step = static_cast<int64_t>(panel_size<W>(2) * sizeof(W)) * kLinearRows / tile.n_rows;
      if constexpr (kInteger<W>) ++args.ahead_step;  // of so few bytes, rounding down would lose a quarter
      int64_t row = 0;
      for (; row + kHalfBlock < tile.n_rows; row += kLinearRows) {
        finish_block<W, kLinearRows>(args, last, tile.finish, tile.activation);
        args.ahead += args.ahead_step * (args.depth / 2);
        args.a.advance(kLinearRows);
        args.partial += kLinearRows * kLinearPanel;
        args.out += kLinearRows * tile.out_stride;
      }
      if (row < tile.n_rows) finish_block<W, kHalfBlock>(args, last, tile.finish, tile.activation);
    }
  }
}

REVIT_INLINE int64_t whole_rows(int64_t n_rows) { return round_up(n_rows, kHalfBlock); }

// Size of a row of `depth` factors, in floats; 0 if the rows are used as they are.
template <class W>
REVIT_INLINE int64_t factors_size(int64_t depth) {
  if constexpr (kInteger<W>) return QuantizedRows::size(depth, chain_of<W>(depth));
#if REVIT_BF16
  if constexpr (kRounded<W>) return RoundedRows::size(depth);
#endif
  return 0;
}

// The factors of rows [0, n_rows) of `depth` values, rounded into `memory` if need be.
template <class W>
REVIT_INLINE Factors<W> factors_of(const float* rows, int64_t stride, int64_t n_rows, int64_t depth, float* memory) {
  if constexpr (kInteger<W>) {
    return quantize_rows(rows, stride, n_rows, depth, chain_of<W>(depth), memory);
#if REVIT_BF16
  } else if constexpr (kRounded<W>) {
    return round_rows(rows, stride, n_rows, depth, memory);
#endif
  } else {
    return {rows, stride};
  }
}

template <class W>
void linear_tile(const LinearTile& tile) {
  const int64_t rows = whole_rows(tile.n_rows), depth = tile.weight.depth;
  const auto [partial, rounded] = Arrays<float, 2>({rows * kLinearPanel, rows * factors_size<W>(depth)}).array;
  const Factors<W> a = factors_of<W>(tile.a, tile.a_stride, tile.n_rows, depth, rounded);
  linear_chains<W>(tile, a, 0, depth, partial, 0);
}

const LinearKernels linear_kernels = {
    kLinearPanel, kHalfBlock, kRounded<BFloat16>, {linear_tile<float>, linear_tile<BFloat16>, linear_tile<int8_t>}};
