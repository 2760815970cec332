// LayerNorm of one row after another:
//
//   s = x + residual (rounded to the type of x, or x itself)
//   mean = sum(s) / C,  rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)
//   y = (s - mean) * rstd * weight + bias
//
// The first pass over a row computes m, an estimate of the mean with the rounding error of a long sum of large numbers.
// The second pass, over the row now in L1, works on s - m, which is (nearly) exact: d = sum(s - m) / C corrects the
// mean, and sum((s - m)^2) / C - d^2 is the variance (the corrected two-pass algorithm of Chan, Golub and LeVeque,
// 1983). So an input of mean 1e4 and standard deviation 1 keeps the accuracy of a centred one. The third pass writes y.
//
// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) does not centre rows and has no bias. Its first pass sums s^2, and its
// second pass writes y:
//
//   rstd = 1 / sqrt(sum(s^2) / C + eps),  y = s * rstd * weight
//
// Backward, with xhat = (s - mean) * rstd and h = grad_y * weight:
//
//   grad_x = rstd * (h - sum(h) / C - xhat * sum(h * xhat) / C) + grad_sum
//   grad_weight = sum over rows of grad_y * xhat,  grad_bias = sum over rows of grad_y
//
// For RMSNorm, mean and sum(h) are left out.
//
// Every sum runs over whole vectors in order, then over the ragged end of the row: its order depends on C alone.

// Loads the first n < N elements at p, then zeros; reads nothing beyond the n elements.
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

// Stores a vector past the caches if the platform can: the line is neither fetched first nor kept. `p` is aligned.
template <class V, class T>
REVIT_INLINE void store_streaming(T* p, V v) {
#if REVIT_LANES >= 8
  constexpr int kParts = sizeof(V) / 32;
  __m256i part[kParts];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int i = 0; i < kParts; ++i) _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + i, part[i]);
#elif defined(__x86_64__)
  constexpr int kParts = sizeof(V) / 16;
  __m128i part[kParts];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int i = 0; i < kParts; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, part[i]);
#else
  __builtin_memcpy(p, &v, sizeof(v));
#endif
}

// What a row is divided by: its standard deviation, after its mean is subtracted, or its root mean square.
enum class Norm { kLayer, kRms };

// How the sum with the residual is written: not at all, to be read again soon, or past the caches.
enum class Sum { kNone, kCached, kStreamed };

// Sums s, or s^2 for RMSNorm. If there is a residual, s is stored in `sum`, rounded. If the next passes need s in
// another type, or `sum` is streamed, s is also stored in `wide`, in the compute type.
template <class T, Sum kSum, Norm kNorm>
struct RowSum {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  static constexpr bool kResidual = kSum != Sum::kNone;
  static constexpr bool kWide = sizeof(T) < sizeof(C) || kSum == Sum::kStreamed;
  const T* x;
  const T* residual;
  T* sum;
  C* wide;

  REVIT_INLINE V vector(int64_t c) const {
    V s = load<N>(x + c);
    if constexpr (kResidual) s += load<N>(residual + c);
    if constexpr (kSum == Sum::kCached) store<N>(sum + c, s);
    if constexpr (kSum == Sum::kStreamed) store_streaming(sum + c, s);
    if constexpr (kSum == Sum::kCached && sizeof(T) < sizeof(C)) s = load<N>(sum + c);
    if constexpr (kWide) store<N>(wide + c, s);
    return s;
  }

  REVIT_INLINE V ragged(int64_t c, int64_t n) const {
    V s = load_first<N>(x + c, n);
    if constexpr (kResidual) {
      store_first<N>(sum + c, s + load_first<N>(residual + c, n), n);
      s = load_first<N>(sum + c, n);
    }
    if constexpr (kWide) store_first<N>(wide + c, s, n);
    return s;
  }

  REVIT_INLINE static V term(V s) { return kNorm == Norm::kRms ? s * s : s; }

  REVIT_INLINE C operator()(int64_t n_channels) const {
    V a0 = {}, a1 = {}, a2 = {}, a3 = {};
    int64_t c = 0;
    for (; c + 4 * N <= n_channels; c += 4 * N) {
      a0 += term(vector(c));
      a1 += term(vector(c + N));
      a2 += term(vector(c + 2 * N));
      a3 += term(vector(c + 3 * N));
    }
    for (; c + N <= n_channels; c += N) a0 += term(vector(c));
    if (c < n_channels) a1 += term(ragged(c, n_channels - c));
    return reduce_add<C, N>((a0 + a1) + (a2 + a3));
  }
};

// Sums s - m and its square.
template <class C>
REVIT_INLINE void row_moments(const C* s, C m, int64_t n_channels, C* first, C* second) {
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
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

// m is the estimate of the mean, `mean` the mean; (s - m) * rstd + offset is (s - mean) * rstd.
template <class C>
struct RowStatistics {
  C m, mean, rstd, offset;
};

// `sum` is what RowSum gives for the row.
template <Norm kNorm, class C>
REVIT_INLINE RowStatistics<C> row_statistics(const C* s, C sum, C eps, int64_t n_channels) {
  const C count = static_cast<C>(n_channels), m = sum / count;
  if constexpr (kNorm == Norm::kRms) return {0, 0, C(1) / std::sqrt(m + eps), 0};
  C first, second;
  row_moments(s, m, n_channels, &first, &second);
  const C d = first / count;
  const C variance = second / count - d * d;
  const C rstd = C(1) / std::sqrt((variance < 0 ? C(0) : variance) + eps);
  return {m, m + d, rstd, -d * rstd};
}

template <Norm kNorm, class T, class C>
REVIT_INLINE void row_write(const C* s, const C* weight, const C* bias, const RowStatistics<C>& row, T* y,
                            int64_t n_channels) {
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  const C m = row.m, rstd = row.rstd, offset = row.offset;
  int64_t c = 0;
  for (; c + N <= n_channels; c += N) {
    if constexpr (kNorm == Norm::kRms) {
      store<N>(y + c, load<N>(s + c) * rstd * load<N>(weight + c));
    } else {
      const V xhat = (load<N>(s + c) - m) * rstd + offset;
      store<N>(y + c, xhat * load<N>(weight + c) + load<N>(bias + c));
    }
  }
  if (const int64_t n = n_channels - c) {
    if constexpr (kNorm == Norm::kRms) {
      store_first<N>(y + c, load_first<N>(s + c, n) * rstd * load_first<N>(weight + c, n), n);
    } else {
      const V xhat = (load_first<N>(s + c, n) - m) * rstd + offset;
      store_first<N>(y + c, xhat * load_first<N>(weight + c, n) + load_first<N>(bias + c, n), n);
    }
  }
}

template <class T, Norm kNorm, Sum kSum>
void layer_norm_rows(const LayerNormArgs& args) {
  using C = Compute<T>;
  const int64_t n_channels = args.n_channels;
  const C eps = static_cast<C>(args.eps);
  const C* weight = static_cast<const C*>(args.weight);
  const C* bias = static_cast<const C*>(args.bias);
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* sum = static_cast<T*>(args.sum);
  T* y = static_cast<T*>(args.y);
  C* mean = static_cast<C*>(args.mean);
  C* rstd = static_cast<C*>(args.rstd);
  C* wide = static_cast<C*>(args.scratch);
  for (int64_t r = 0; r < args.n_rows; ++r) {
    const RowSum<T, kSum, kNorm> first = {x, residual, sum, wide};
    const C total = first(n_channels);
    const C* s = wide;
    if constexpr (!first.kWide) s = kSum == Sum::kNone ? x : sum;
    const RowStatistics<C> row = row_statistics<kNorm>(s, total, eps, n_channels);
    if constexpr (kNorm == Norm::kLayer) mean[r] = row.mean;
    rstd[r] = row.rstd;
    row_write<kNorm>(s, weight, bias, row, y, n_channels);
    x += n_channels;
    y += n_channels;
    if constexpr (kSum != Sum::kNone) {
      residual += n_channels;
      sum += n_channels;
    }
  }
#if defined(__x86_64__)
  if constexpr (kSum == Sum::kStreamed) _mm_sfence();
#endif
}

template <class T, Norm kNorm>
void layer_norm_forward_of(const LayerNormArgs& args) {
  if (args.residual == nullptr) return layer_norm_rows<T, kNorm, Sum::kNone>(args);
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    // Only whole, aligned vectors can be streamed.
    const bool aligned = reinterpret_cast<uintptr_t>(args.sum) % 32 == 0 && args.n_channels * sizeof(T) % 64 == 0;
    if (args.streams_sum && aligned) return layer_norm_rows<T, kNorm, Sum::kStreamed>(args);
  }
  layer_norm_rows<T, kNorm, Sum::kCached>(args);
}

template <class T>
void layer_norm_forward(const LayerNormArgs& args) {
  if (args.bias == nullptr) return layer_norm_forward_of<T, Norm::kRms>(args);
  layer_norm_forward_of<T, Norm::kLayer>(args);
}

// Processes channels c to c + N of kRows rows at once, so that the running sums over rows are loaded and stored once
// for all of them. The running sums grow by sums of kRows rows; the rounding errors are kept in the two rows of `lost`.
// Leaves xhat and h of row r in scratch rows 2r and 2r + 1.
template <class T, Norm kNorm, int kRows>
struct BackwardSums {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  const T* grad_y;
  const T* x;
  const C* weight;
  const C* mean;
  const C* rstd;
  C* grad_weight;
  C* grad_bias;
  C* lost;
  C* scratch;
  int64_t n_channels;

  // total[0 : n] += value
  REVIT_INLINE static void grow(V value, int64_t n, C* total, C* lost) {
    V sum = n < N ? load_first<N>(total, n) : load<N>(total), rest = n < N ? load_first<N>(lost, n) : load<N>(lost);
    add_exactly(value, &sum, &rest);
    if (n < N) {
      store_first<N>(total, sum, n);
      store_first<N>(lost, rest, n);
    } else {
      store<N>(total, sum);
      store<N>(lost, rest);
    }
  }

  REVIT_INLINE V normalised(V s, int r) const {
    if constexpr (kNorm == Norm::kRms) return s * rstd[r];
    return (s - mean[r]) * rstd[r];
  }

  void operator()(C* sum_h, C* sum_hx) const {
    V h_sums[kRows] = {}, hx_sums[kRows] = {};
    int64_t c = 0;
    for (; c + N <= n_channels; c += N) {
      const V w = load<N>(weight + c);
      V dw = {}, db = {};
      for (int r = 0; r < kRows; ++r) {
        const V g = load<N>(grad_y + r * n_channels + c);
        const V xhat = normalised(load<N>(x + r * n_channels + c), r);
        const V h = g * w;
        store<N>(scratch + 2 * r * n_channels + c, xhat);
        store<N>(scratch + (2 * r + 1) * n_channels + c, h);
        h_sums[r] += h;
        hx_sums[r] += h * xhat;
        dw += g * xhat;
        db += g;
      }
      grow(dw, N, grad_weight + c, lost + c);
      if constexpr (kNorm == Norm::kLayer) grow(db, N, grad_bias + c, lost + n_channels + c);
    }
    if (const int64_t n = n_channels - c) {
      const V w = load_first<N>(weight + c, n);
      V dw = {}, db = {};
      for (int r = 0; r < kRows; ++r) {
        const V g = load_first<N>(grad_y + r * n_channels + c, n);
        const V xhat = keep_first<C, N>(normalised(load_first<N>(x + r * n_channels + c, n), r), n);
        const V h = g * w;
        store_first<N>(scratch + 2 * r * n_channels + c, xhat, n);
        store_first<N>(scratch + (2 * r + 1) * n_channels + c, h, n);
        h_sums[r] += h;
        hx_sums[r] += h * xhat;
        dw += g * xhat;
        db += g;
      }
      grow(dw, n, grad_weight + c, lost + c);
      if constexpr (kNorm == Norm::kLayer) grow(db, n, grad_bias + c, lost + n_channels + c);
    }
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kNorm == Norm::kLayer) sum_h[r] = reduce_add<C, N>(h_sums[r]);
      sum_hx[r] = reduce_add<C, N>(hx_sums[r]);
    }
  }
};

template <class T, Norm kNorm, bool kGradSum>
REVIT_INLINE void backward_write(const Compute<T>* xhat, const Compute<T>* h, const T* grad_sum, Compute<T> mean_h,
                                 Compute<T> mean_hx, Compute<T> rstd, T* grad_x, int64_t n_channels) {
  constexpr int N = kLanes<Compute<T>>;
  using V = Vec<Compute<T>, N>;
  const auto gradient = [&](V h, V xhat) {
    if constexpr (kNorm == Norm::kRms) return (h - xhat * mean_hx) * rstd;
    return (h - mean_h - xhat * mean_hx) * rstd;
  };
  int64_t c = 0;
  for (; c + N <= n_channels; c += N) {
    V grad = gradient(load<N>(h + c), load<N>(xhat + c));
    if constexpr (kGradSum) grad += load<N>(grad_sum + c);
    store<N>(grad_x + c, grad);
  }
  if (const int64_t n = n_channels - c) {
    V grad = gradient(load_first<N>(h + c, n), load_first<N>(xhat + c, n));
    if constexpr (kGradSum) grad += load_first<N>(grad_sum + c, n);
    store_first<N>(grad_x + c, grad, n);
  }
}

template <class T, Norm kNorm>
void layer_norm_backward_of(const LayerNormBackwardArgs& args) {
  using C = Compute<T>;
  constexpr int kRows = (kLayerNormBackwardScratchRows - 2) / 2;
  const int64_t n_channels = args.n_channels;
  const C count = static_cast<C>(n_channels);
  const T* grad_y = static_cast<const T*>(args.grad_y);
  const T* grad_sum = static_cast<const T*>(args.grad_sum);
  const T* x = static_cast<const T*>(args.x);
  const C* weight = static_cast<const C*>(args.weight);
  const C* mean = static_cast<const C*>(args.mean);
  const C* rstd = static_cast<const C*>(args.rstd);
  T* grad_x = static_cast<T*>(args.grad_x);
  C* grad_weight = static_cast<C*>(args.grad_weight);
  C* grad_bias = static_cast<C*>(args.grad_bias);
  C* scratch = static_cast<C*>(args.scratch);
  C* lost = scratch + 2 * kRows * n_channels;
  std::fill_n(lost, 2 * n_channels, C(0));
  std::fill_n(grad_weight, n_channels, C(0));
  if constexpr (kNorm == Norm::kLayer) std::fill_n(grad_bias, n_channels, C(0));
  for (int64_t row = 0; row < args.n_rows;) {
    const T* g = grad_y + row * n_channels;
    const T* s = x + row * n_channels;
    const int64_t n = args.n_rows - row >= kRows ? kRows : 1;
    C sum_h[kRows], sum_hx[kRows];
    const C* means = kNorm == Norm::kLayer ? mean + row : nullptr;
    if (n == kRows) {
      BackwardSums<T, kNorm, kRows>{g, s, weight, means, rstd + row, grad_weight, grad_bias, lost, scratch, n_channels}(
          sum_h, sum_hx);
    } else {
      BackwardSums<T, kNorm, 1>{g, s, weight, means, rstd + row, grad_weight, grad_bias, lost, scratch, n_channels}(
          sum_h, sum_hx);
    }
    for (int64_t r = 0; r < n; ++r, ++row) {
      const int64_t at = row * n_channels;
      const C* xhat = scratch + 2 * r * n_channels;
      const C mean_h = kNorm == Norm::kLayer ? sum_h[r] / count : C(0), mean_hx = sum_hx[r] / count;
      if (grad_sum != nullptr) {
        backward_write<T, kNorm, true>(xhat, xhat + n_channels, grad_sum + at, mean_h, mean_hx, rstd[row], grad_x + at,
                                       n_channels);
      } else {
        backward_write<T, kNorm, false>(xhat, xhat + n_channels, nullptr, mean_h, mean_hx, rstd[row], grad_x + at,
                                        n_channels);
      }
    }
  }
  for (int64_t c = 0; c < n_channels; ++c) {
    grad_weight[c] += lost[c];
    if constexpr (kNorm == Norm::kLayer) grad_bias[c] += lost[n_channels + c];
  }
}

template <class T>
void layer_norm_backward(const LayerNormBackwardArgs& args) {
  if (args.mean == nullptr) return layer_norm_backward_of<T, Norm::kRms>(args);
  layer_norm_backward_of<T, Norm::kLayer>(args);
}

template <class W>
void layer_norm_reduce(const LayerNormReduceArgs& args) {
  using C = Compute<W>;
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  const int64_t n_channels = args.n_channels;
  for (int which = 0; which < (args.grad_bias == nullptr ? 1 : 2); ++which) {
    const C* parts = static_cast<const C*>(args.parts) + which * n_channels;
    W* out = static_cast<W*>(which == 0 ? args.grad_weight : args.grad_bias);
    int64_t c = 0;
    for (; c + N <= n_channels; c += N) {
      V sum = {}, lost = {};
      for (int64_t p = 0; p < args.n_parts; ++p) add_exactly(load<N>(parts + 2 * p * n_channels + c), &sum, &lost);
      store<N>(out + c, sum + lost);
    }
    if (const int64_t n = n_channels - c) {
      V sum = {}, lost = {};
      for (int64_t p = 0; p < args.n_parts; ++p) {
        add_exactly(load_first<N>(parts + 2 * p * n_channels + c, n), &sum, &lost);
      }
      store_first<N>(out + c, sum + lost, n);
    }
  }
}

template <class W>
void widen_elements(const WidenArgs& args) {
  using C = Compute<W>;
  constexpr int N = kLanes<C>;
  const W* in = static_cast<const W*>(args.in);
  C* out = static_cast<C*>(args.out);
  int64_t i = 0;
  for (; i + N <= args.n; i += N) store<N>(out + i, load<N>(in + i));
  for (; i < args.n; ++i) out[i] = widen(in[i]);
}

#ifndef REVIT_BASE
const LayerNormKernels layer_norm_kernels = {
    {layer_norm_forward<float>, layer_norm_forward<BFloat16>, layer_norm_forward<Float16>, layer_norm_forward<double>},
    {layer_norm_backward<float>, layer_norm_backward<BFloat16>, layer_norm_backward<Float16>,
     layer_norm_backward<double>},
    {layer_norm_reduce<float>, layer_norm_reduce<BFloat16>, layer_norm_reduce<Float16>, layer_norm_reduce<double>},
    {widen_elements<float>, widen_elements<BFloat16>, widen_elements<Float16>, widen_elements<double>},
};
#endif
