// LayerNorm of one row after another:
//
//   s = x + residual (rounded to the type of x, or x itself)
//   mean = sum(s) / C,  rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)
//   y = (s - mean) * rstd * weight + bias
//
// The first pass over a row adds up m, an estimate of the mean that is off by the rounding of a long sum of large
// numbers. The second, over the row now in L1, works on s - m, which is (nearly) exact: d = sum(s - m) / C corrects the
// mean, and sum((s - m)^2) / C - d^2 is the variance (the corrected two-pass algorithm of Chan, Golub and LeVeque,
// 1983). An input of mean 1e4 and standard deviation 1 so keeps the accuracy of a centred one. The third pass writes y.
//
// Backward, with xhat = (s - mean) * rstd and h = grad_y * weight:
//
//   grad_x = rstd * (h - sum(h) / C - xhat * sum(h * xhat) / C) + grad_sum
//   grad_weight = sum over rows of grad_y * xhat,  grad_bias = sum over rows of grad_y
//
// Every sum runs over whole vectors in order, then over the ragged end of the row: its order depends on C alone.

// The first n < N elements at p, zeros behind them; reads nothing beyond.
template <int N, class T>
REVIT_INLINE Vec<Compute<T>, N> load_first(const T* p, int64_t n) {
  T padded[N] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load<N>(padded);
}

template <int N, class T>
REVIT_INLINE void store_first(T* p, Vec<Compute<T>, N> v, int64_t n) {
  T padded[N];
  store<N>(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// v with zeros from lane n on.
template <class C, int N>
REVIT_INLINE Vec<C, N> keep_first(Vec<C, N> v, int64_t n) {
  for (int64_t i = n; i < N; ++i) v[i] = 0;
  return v;
}

template <class T, bool kResidual>
struct NormRow {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  using V = Vec<C, N>;

  // Adds the row up; with a residual, adds that first and stores the sum, as rounded, for the passes that follow.
  static REVIT_INLINE C total(const T* x, const T* residual, T* sum, int64_t n_channels) {
    V a0 = {}, a1 = {}, a2 = {}, a3 = {};
    int64_t c = 0;
    for (; c + 4 * N <= n_channels; c += 4 * N) {
      a0 += term(x, residual, sum, c);
      a1 += term(x, residual, sum, c + N);
      a2 += term(x, residual, sum, c + 2 * N);
      a3 += term(x, residual, sum, c + 3 * N);
    }
    for (; c + N <= n_channels; c += N) a0 += term(x, residual, sum, c);
    if (const int64_t n = n_channels - c) {
      V v = load_first<N>(x + c, n);
      if constexpr (kResidual) {
        store_first<N>(sum + c, v + load_first<N>(residual + c, n), n);
        v = load_first<N>(sum + c, n);
      }
      a1 += v;
    }
    return reduce_add<C, N>((a0 + a1) + (a2 + a3));
  }

  static REVIT_INLINE V term(const T* x, const T* residual, T* sum, int64_t c) {
    if constexpr (!kResidual) return load<N>(x + c);
    const V added = load<N>(x + c) + load<N>(residual + c);
    store<N>(sum + c, added);
    if constexpr (sizeof(T) == sizeof(C)) return added;
    return load<N>(sum + c);
  }

  // Adds up s - m and its square.
  static REVIT_INLINE void moments(const T* s, C m, int64_t n_channels, C* first, C* second) {
    V d0 = {}, d1 = {}, q0 = {}, q1 = {};
    int64_t c = 0;
    for (; c + 2 * N <= n_channels; c += 2 * N) {
      const V v0 = load<N>(s + c) - m;
      const V v1 = load<N>(s + c + N) - m;
      d0 += v0;
      d1 += v1;
      q0 += v0 * v0;
      q1 += v1 * v1;
    }
    for (; c + N <= n_channels; c += N) {
      const V v = load<N>(s + c) - m;
      d0 += v;
      q0 += v * v;
    }
    if (const int64_t n = n_channels - c) {
      const V v = keep_first<C, N>(load_first<N>(s + c, n) - m, n);
      d1 += v;
      q1 += v * v;
    }
    *first = reduce_add<C, N>(d0 + d1);
    *second = reduce_add<C, N>(q0 + q1);
  }

  // (s - m) * rstd + offset is (s - mean) * rstd, where offset = (m - mean) * rstd.
  template <class W>
  static REVIT_INLINE void write(const T* s, const W* weight, const W* bias, C m, C rstd, C offset, T* y,
                                 int64_t n_channels) {
    const V scale = broadcast<C, N>(rstd), shift = broadcast<C, N>(offset);
    int64_t c = 0;
    for (; c + N <= n_channels; c += N) {
      const V xhat = (load<N>(s + c) - m) * scale + shift;
      store<N>(y + c, xhat * load<N>(weight + c) + load<N>(bias + c));
    }
    if (const int64_t n = n_channels - c) {
      const V xhat = (load_first<N>(s + c, n) - m) * scale + shift;
      store_first<N>(y + c, xhat * load_first<N>(weight + c, n) + load_first<N>(bias + c, n), n);
    }
  }
};

template <class T, class W, bool kResidual>
void layer_norm_rows(const LayerNormArgs& args) {
  using C = Compute<T>;
  using Row = NormRow<T, kResidual>;
  const int64_t n_channels = args.n_channels;
  const C count = static_cast<C>(n_channels), eps = static_cast<C>(args.eps);
  const W* weight = static_cast<const W*>(args.weight);
  const W* bias = static_cast<const W*>(args.bias);
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* sum = static_cast<T*>(args.sum);
  T* y = static_cast<T*>(args.y);
  C* mean = static_cast<C*>(args.mean);
  C* rstd = static_cast<C*>(args.rstd);
  for (int64_t r = 0; r < args.n_rows; ++r) {
    const C m = Row::total(x, residual, sum, n_channels) / count;
    const T* s = kResidual ? sum : x;
    C first, second;
    Row::moments(s, m, n_channels, &first, &second);
    const C d = first / count;
    const C variance = second / count - d * d;
    mean[r] = m + d;
    rstd[r] = C(1) / std::sqrt((variance < 0 ? C(0) : variance) + eps);
    Row::write(s, weight, bias, m, rstd[r], -d * rstd[r], y, n_channels);
    x += n_channels;
    y += n_channels;
    if constexpr (kResidual) {
      residual += n_channels;
      sum += n_channels;
    }
  }
}

template <class T, class W>
void layer_norm_forward(const LayerNormArgs& args) {
  args.residual != nullptr ? layer_norm_rows<T, W, true>(args) : layer_norm_rows<T, W, false>(args);
}

// Sums over the channels of kRows rows at once, so that the running sums over rows are loaded and stored once for
// all of them. The order in which those add is that of the rows, whatever kRows.
template <class T, class W, int kRows>
REVIT_INLINE void layer_norm_backward_sums(const T* grad_y, const T* x, const W* weight, const Compute<T>* mean,
                                           const Compute<T>* rstd, Compute<T>* grad_weight, Compute<T>* grad_bias,
                                           int64_t n_channels, Compute<T>* sum_h, Compute<T>* sum_hx) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  V h_sums[kRows] = {}, hx_sums[kRows] = {};
  int64_t c = 0;
  for (; c + N <= n_channels; c += N) {
    const V w = load<N>(weight + c);
    V dw = load<N>(grad_weight + c), db = load<N>(grad_bias + c);
    for (int r = 0; r < kRows; ++r) {
      const V g = load<N>(grad_y + r * n_channels + c);
      const V xhat = (load<N>(x + r * n_channels + c) - mean[r]) * rstd[r];
      const V h = g * w;
      h_sums[r] += h;
      hx_sums[r] += h * xhat;
      dw += g * xhat;
      db += g;
    }
    store<N>(grad_weight + c, dw);
    store<N>(grad_bias + c, db);
  }
  if (const int64_t n = n_channels - c) {
    const V w = load_first<N>(weight + c, n);
    V dw = load_first<N>(grad_weight + c, n), db = load_first<N>(grad_bias + c, n);
    for (int r = 0; r < kRows; ++r) {
      const V g = load_first<N>(grad_y + r * n_channels + c, n);
      const V xhat = keep_first<C, N>((load_first<N>(x + r * n_channels + c, n) - mean[r]) * rstd[r], n);
      const V h = g * w;
      h_sums[r] += h;
      hx_sums[r] += h * xhat;
      dw += g * xhat;
      db += g;
    }
    store_first<N>(grad_weight + c, dw, n);
    store_first<N>(grad_bias + c, db, n);
  }
  for (int r = 0; r < kRows; ++r) {
    sum_h[r] = reduce_add<C, N>(h_sums[r]);
    sum_hx[r] = reduce_add<C, N>(hx_sums[r]);
  }
}

// grad_x of one row from its two sums.
template <class T, class W, bool kGradSum>
REVIT_INLINE void layer_norm_backward_write(const T* grad_y, const T* grad_sum, const T* x, const W* weight,
                                            Compute<T> mean, Compute<T> rstd, Compute<T> mean_h, Compute<T> mean_hx,
                                            T* grad_x, int64_t n_channels) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  int64_t c = 0;
  for (; c + N <= n_channels; c += N) {
    const V xhat = (load<N>(x + c) - mean) * rstd;
    V grad = (load<N>(grad_y + c) * load<N>(weight + c) - mean_h - xhat * mean_hx) * rstd;
    if constexpr (kGradSum) grad += load<N>(grad_sum + c);
    store<N>(grad_x + c, grad);
  }
  if (const int64_t n = n_channels - c) {
    const V xhat = (load_first<N>(x + c, n) - mean) * rstd;
    V grad = (load_first<N>(grad_y + c, n) * load_first<N>(weight + c, n) - mean_h - xhat * mean_hx) * rstd;
    if constexpr (kGradSum) grad += load_first<N>(grad_sum + c, n);
    store_first<N>(grad_x + c, grad, n);
  }
}

template <class T, class W>
void layer_norm_backward(const LayerNormBackwardArgs& args) {
  using C = Compute<T>;
  constexpr int kRows = 2;
  const int64_t n_channels = args.n_channels;
  const C count = static_cast<C>(n_channels);
  const T* grad_y = static_cast<const T*>(args.grad_y);
  const T* grad_sum = static_cast<const T*>(args.grad_sum);
  const T* x = static_cast<const T*>(args.x);
  const W* weight = static_cast<const W*>(args.weight);
  const C* mean = static_cast<const C*>(args.mean);
  const C* rstd = static_cast<const C*>(args.rstd);
  T* grad_x = static_cast<T*>(args.grad_x);
  C* grad_weight = static_cast<C*>(args.grad_weight);
  C* grad_bias = static_cast<C*>(args.grad_bias);
  std::fill_n(grad_weight, n_channels, C(0));
  std::fill_n(grad_bias, n_channels, C(0));
  for (int64_t row = 0; row < args.n_rows;) {
    const int64_t begin = row * n_channels;
    C sum_h[kRows], sum_hx[kRows];
    const int64_t n = args.n_rows - row >= kRows ? kRows : 1;
    if (n == kRows) {
      layer_norm_backward_sums<T, W, kRows>(grad_y + begin, x + begin, weight, mean + row, rstd + row, grad_weight,
                                            grad_bias, n_channels, sum_h, sum_hx);
    } else {
      layer_norm_backward_sums<T, W, 1>(grad_y + begin, x + begin, weight, mean + row, rstd + row, grad_weight,
                                        grad_bias, n_channels, sum_h, sum_hx);
    }
    for (int64_t r = 0; r < n; ++r, ++row) {
      const int64_t at = row * n_channels;
      const C mean_h = sum_h[r] / count, mean_hx = sum_hx[r] / count;
      if (grad_sum != nullptr) {
        layer_norm_backward_write<T, W, true>(grad_y + at, grad_sum + at, x + at, weight, mean[row], rstd[row], mean_h,
                                              mean_hx, grad_x + at, n_channels);
      } else {
        layer_norm_backward_write<T, W, false>(grad_y + at, nullptr, x + at, weight, mean[row], rstd[row], mean_h,
                                               mean_hx, grad_x + at, n_channels);
      }
    }
  }
}

template <class T, class W>
void layer_norm_reduce(const LayerNormReduceArgs& args) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  const int64_t n_channels = args.n_channels;
  for (int which = 0; which < 2; ++which) {
    const C* parts = static_cast<const C*>(args.parts) + which * n_channels;
    W* out = static_cast<W*>(which == 0 ? args.grad_weight : args.grad_bias);
    int64_t c = 0;
    for (; c + N <= n_channels; c += N) {
      V sum = {};
      for (int64_t p = 0; p < args.n_parts; ++p) sum += load<N>(parts + 2 * p * n_channels + c);
      store<N>(out + c, sum);
    }
    if (const int64_t n = n_channels - c) {
      V sum = {};
      for (int64_t p = 0; p < args.n_parts; ++p) sum += load_first<N>(parts + 2 * p * n_channels + c, n);
      store_first<N>(out + c, sum, n);
    }
  }
}

// One entry for every DType, in its order, of kernel<rows, parameters like the rows> and kernel<rows, compute type>.
#define REVIT_FOR_ALL_TYPES(kernel)                                                                      \
  {                                                                                                      \
    {kernel<float, float>, kernel<float, float>}, {kernel<BFloat16, BFloat16>, kernel<BFloat16, float>}, \
        {kernel<Float16, Float16>, kernel<Float16, float>}, {                                            \
      kernel<double, double>, kernel<double, double>                                                     \
    }                                                                                                    \
  }

const LayerNormKernels layer_norm_kernels = {
    REVIT_FOR_ALL_TYPES(layer_norm_forward),
    REVIT_FOR_ALL_TYPES(layer_norm_backward),
    REVIT_FOR_ALL_TYPES(layer_norm_reduce),
};

#undef REVIT_FOR_ALL_TYPES
