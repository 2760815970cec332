// Linear layers on packed weights (see linear.h).
//
// The sum over the depth is cut into equal chains of at most kMaxChain, so that a chain of a panel stays in the first
// cache while all rows of a tile pass over it. Every output is the sum of its chains in order, each one chain of
// multiply-adds: the same bits whatever the tile, its height and its place.

// Rows of a block: with two vectors of columns it needs twelve accumulators of sixteen registers, or twenty-four of the
// thirty-two that AVX-512 has.
inline constexpr int kLinearRows = kBlockRows;
inline constexpr int kHalfBlock = kLinearRows / 2;
inline constexpr int64_t kLinearPanel = kPanel<float>;

inline constexpr int64_t kMaxChain = 256;

// Depth of every chain but the last: whole panels, so that the chains of a layer are the chunks of columns in which
// the layer before it is computed.
REVIT_INLINE int64_t chain_of(int64_t depth) {
  const int64_t n_chains = std::max<int64_t>(1, (depth + kMaxChain - 1) / kMaxChain);
  return round_up((depth + n_chains - 1) / n_chains, kLinearPanel);
}

// Elements of T that `depth` rows of a panel take.
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
  // A mask would take one of sixteen registers, for want of which GCC spills sums. It is not to make one of the shifts.
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

// x Phi(x) as max(x, 0) - |x| Phi(-|x|). The last term is a small bump that a polynomial of degree 17 fits to 3e-8 on
// [0, 5.4], beyond which it is less than 2e-7; the absolute error is below 3e-7, that of 0.5 x (1 + erf(x / sqrt 2)) in
// float 4.5e-7. The fit is ours: reweighted least squares in u = |x| / 2.7 - 1, which keeps its coefficients small.
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

// 1 / (1 + e^-x), from e^-|x| so that nothing overflows.
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
  return x;
}

// Three rows at a time: their polynomials, each a long chain of dependent steps, overlap and share their constants.
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
    default:
      return;
  }
}

struct BlockArgs {
  int64_t depth;
  const float* a;
  int64_t a_stride;
  const void* b;       // depth rows of a panel
  float* partial;      // [rows][panel], sums of the chains before and, but for the last chain, after
  bool first;          // there is no chain before
  const char* ahead;   // this block's share of the chain after this one
  int64_t ahead_step;  // bytes of it to ask for with every two depths
  const float* bias;   // of the panel; used by the last chain
  float* out;          // written by the last chain
  int64_t out_stride;
};

enum class Chain { kInner, kStore, kAdd };  // not the last; the last, stored; the last, added to `out`

template <class W, int rows, Chain kind>
__attribute__((noinline)) void multiply_weights(const BlockArgs& args) {
  constexpr int n = kLanes<float>;
  using V = Vec<float, n>;
  V sum[2 * rows] = {};
  const int64_t stride = args.a_stride;
  // Rows are addressed from every third: an address can add one or two strides to a base, and no more.
  constexpr int kBases = rows / 3;
  const float* base[kBases];
  unroll<kBases>([&](auto g) __attribute__((always_inline)) { base[g] = args.a + 3 * g * stride; });
  const auto advance = [&](int depth) __attribute__((always_inline)) {
    unroll<kBases>([&](auto g) __attribute__((always_inline)) { base[g] += depth; });
  };
  const auto add = [&](int k, V b0, V b1) __attribute__((always_inline)) {
    unroll<rows>([&](auto i) __attribute__((always_inline)) {
      const V factor = broadcast<float, n>(base[i / 3][i % 3 * stride + k]);
      sum[2 * i] += factor * b0;
      sum[2 * i + 1] += factor * b1;
    });
  };
  const W* b = static_cast<const W*>(args.b);
  const char* ahead = args.ahead;
  int64_t k = args.depth;
  if constexpr (std::is_same_v<W, float>) {
    // Two depths a step: GCC 12 keeps all sums in registers, with four it spills two of them.
    for (; k >= 2; k -= 2) {
      add(0, load<n>(b), load<n>(b + n));
      add(1, load<n>(b + 2 * n), load<n>(b + 3 * n));
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_step;
      advance(2);
      b += 4 * n;
    }
    if (k > 0) add(0, load<n>(b), load<n>(b + n));
  } else {
    for (; k >= 2; k -= 2) {
      add(0, load_even<n>(b), load_even<n>(b + 2 * n));
      // Read again, not kept in registers meanwhile.
      asm volatile("" : "+r"(b) : : "memory");
      add(1, load_odd<n>(b), load_odd<n>(b + 2 * n));
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_step;
      advance(2);
      b += 4 * n;
    }
    if (k > 0) add(0, load_even<n>(b), load_even<n>(b + 2 * n));
  }
  if (!args.first) {
    unroll<2 * rows>([&](auto i) __attribute__((always_inline)) { sum[i] = load<n>(args.partial + i * n) + sum[i]; });
  }
  if constexpr (kind == Chain::kInner) {
    unroll<2 * rows>([&](auto i) __attribute__((always_inline)) { store<n>(args.partial + i * n, sum[i]); });
  } else {
    const V bias0 = load<n>(args.bias), bias1 = load<n>(args.bias + n);
    unroll<rows>([&](auto i) __attribute__((always_inline)) {
      float* out = args.out + i * args.out_stride;
      V v0 = sum[2 * i] + bias0, v1 = sum[2 * i + 1] + bias1;
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
REVIT_INLINE void finish_block(const BlockArgs& args, bool last, Finish finish, Activation activation) {
  if (!last) return multiply_weights<W, rows, Chain::kInner>(args);
  if (finish == Finish::kAdd) return multiply_weights<W, rows, Chain::kAdd>(args);
  multiply_weights<W, rows, Chain::kStore>(args);
  if (finish == Finish::kActivate) activate_block<rows>(activation, args.out, args.out_stride);
}

// The chains [first_k, end_k) of `tile`; a later call goes on where `end_k` is not the whole depth. `partial` holds
// [n_panels][rows, whole half blocks][panel] sums from one call to the next, or of one panel where the call does it
// all.
template <class W>
void linear_chains(const LinearTile& tile, int64_t first_k, int64_t end_k, float* partial, int64_t partial_stride) {
  const int64_t depth = tile.weight.depth, chain = chain_of(depth);
  const W* panels = static_cast<const W*>(tile.weight.panels);
  for (int64_t p = tile.first_panel; p < tile.end_panel; ++p) {
    const W* panel = panels + p * panel_size<W>(depth);
    float* sums = partial + (p - tile.first_panel) * partial_stride;
    float* out = tile.out + (p - tile.first_panel) * kLinearPanel;
    for (int64_t k = first_k; k < end_k; k += chain) {
      BlockArgs args = {std::min(chain, depth - k),
                        tile.a + (k - first_k),
                        tile.a_stride,
                        panel + panel_size<W>(k),
                        sums,
                        k == 0,
                        nullptr,
                        0,
                        tile.weight.bias + p * kLinearPanel,
                        out,
                        tile.out_stride};
      const bool last = k + args.depth == depth;
      // The weights pass by once for every tile, from beyond the second cache: while a chain is multiplied, the one
      // behind it in memory is asked for, each block of rows a share.
      args.ahead = reinterpret_cast<const char*>(panel + panel_size<W>(k + args.depth));
      args.ahead_step = static_cast<int64_t>(panel_size<W>(2) * sizeof(W)) * kLinearRows / tile.n_rows;
      int64_t row = 0;
      for (; row + kHalfBlock < tile.n_rows; row += kLinearRows) {
        finish_block<W, kLinearRows>(args, last, tile.finish, tile.activation);
        args.ahead += args.ahead_step * (args.depth / 2);
        args.a += kLinearRows * tile.a_stride;
        args.partial += kLinearRows * kLinearPanel;
        args.out += kLinearRows * tile.out_stride;
      }
      if (row < tile.n_rows) finish_block<W, kHalfBlock>(args, last, tile.finish, tile.activation);
    }
  }
}

REVIT_INLINE int64_t whole_rows(int64_t n_rows) { return round_up(n_rows, kHalfBlock); }

template <class W>
void linear_tile(const LinearTile& tile) {
  const auto [partial] = Arrays<float, 1>({whole_rows(tile.n_rows) * kLinearPanel}).array;
  linear_chains<W>(tile, 0, tile.weight.depth, partial, 0);
}

const LinearKernels linear_kernels = {kLinearPanel, kHalfBlock, {linear_tile<float>, linear_tile<BFloat16>}};
