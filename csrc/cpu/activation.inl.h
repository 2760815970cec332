// Activations of linear layers, on blocks of a panel's width.

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

// Applies the activation to `rows` rows of a panel.
template <Activation activation, int rows>
REVIT_INLINE void activate_together(float* out, int64_t stride) {
  constexpr int n = kLanes<float>;
  Vec<float, n> v[2 * rows];
  unroll<2 * rows>([&](auto j) __attribute__((always_inline)) { v[j] = load<n>(out + j / 2 * stride + j % 2 * n); });
  unroll<2 * rows>([&](auto j) __attribute__((always_inline)) { v[j] = activate<activation, n>(v[j]); });
  unroll<2 * rows>([&](auto j) __attribute__((always_inline)) { store<n>(out + j / 2 * stride + j % 2 * n, v[j]); });
}

// Three rows at a time. A polynomial is a long chain of dependent steps; those of three rows overlap and share their
// constants.
template <Activation activation>
__attribute__((noinline)) void activate_rows(float* out, int64_t stride, int64_t rows) {
  constexpr int kTogether = 3;
  for (; rows >= kTogether; rows -= kTogether, out += kTogether * stride) {
    activate_together<activation, kTogether>(out, stride);
  }
  for (; rows > 0; --rows, out += stride) activate_together<activation, 1>(out, stride);
}

REVIT_INLINE void activate_block(Activation activation, float* out, int64_t stride, int64_t rows) {
  switch (activation) {
    case Activation::kGelu:
      return activate_rows<Activation::kGelu>(out, stride, rows);
    case Activation::kGeluTanh:
      return activate_rows<Activation::kGeluTanh>(out, stride, rows);
    case Activation::kSilu:
      return activate_rows<Activation::kSilu>(out, stride, rows);
    case Activation::kRelu:
      return activate_rows<Activation::kRelu>(out, stride, rows);
    case Activation::kQuickGelu:
      return activate_rows<Activation::kQuickGelu>(out, stride, rows);
    default:
      return;
  }
}
