// Row arithmetic behind token assembly and mean pooling (see tokens.h for the formulas).
//
// Every channel is summed by itself, in blocks of kSumBlock rows. The sums of the blocks are added in order; the
// rounding error of each addition is kept and added at the end. The order depends only on the number of rows, and the
// error hardly grows with it.

constexpr int64_t kSumBlock = 8;

template <class T>
void add_elements(const AddArgs& args) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* a = static_cast<const T*>(args.a);
  const T* b = static_cast<const T*>(args.b);
  T* out = static_cast<T*>(args.out);
  int64_t i = 0;
  for (; i + N <= args.n; i += N) store<N>(out + i, load<N>(a + i) + load<N>(b + i));
  for (; i < args.n; ++i) narrow(widen(a[i]) + widen(b[i]), out + i);
}

template <class T>
void divide_elements(const DivideArgs& args) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  const C divisor = static_cast<C>(args.divisor);
  int64_t i = 0;
  for (; i + N <= args.n; i += N) store<N>(out + i, load<N>(x + i) / divisor);
  for (; i < args.n; ++i) narrow(widen(x[i]) / divisor, out + i);
}

// Sums kVectors vectors of channels, from channel c on.
template <class T, int kVectors>
REVIT_INLINE void sum_rows_vectors(const SumRowsArgs& args, int64_t c) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  using V = Vec<C, N>;
  const T* x = static_cast<const T*>(args.x);
  V total[kVectors] = {}, lost[kVectors] = {};
  for (int64_t begin = 0; begin < args.n_rows; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, args.n_rows);
    V block[kVectors] = {};
    for (int64_t i = begin; i < end; ++i) {
      const T* row = x + (args.rows != nullptr ? args.rows[i] : i) * args.stride + c;
      for (int v = 0; v < kVectors; ++v) block[v] += load<N>(row + v * N);
    }
    for (int v = 0; v < kVectors; ++v) add_exactly(block[v], &total[v], &lost[v]);
  }
  T* out = static_cast<T*>(args.out) + c;
  for (int v = 0; v < kVectors; ++v) {
    store<N>(out + v * N, (total[v] + lost[v]) / static_cast<C>(args.divisor));
  }
}

template <class T>
void sum_rows(const SumRowsArgs& args) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  int64_t c = 0;
  for (; c + 4 * N <= args.n_channels; c += 4 * N) sum_rows_vectors<T, 4>(args, c);
  for (; c + N <= args.n_channels; c += N) sum_rows_vectors<T, 1>(args, c);
  for (; c < args.n_channels; ++c) {
    const T* x = static_cast<const T*>(args.x);
    C total = 0, lost = 0;
    for (int64_t begin = 0; begin < args.n_rows; begin += kSumBlock) {
      const int64_t end = std::min(begin + kSumBlock, args.n_rows);
      C block = 0;
      for (int64_t i = begin; i < end; ++i)
        block += widen(x[(args.rows != nullptr ? args.rows[i] : i) * args.stride + c]);
      add_exactly(block, &total, &lost);
    }
    narrow((total + lost) / static_cast<C>(args.divisor), static_cast<T*>(args.out) + c);
  }
}

#ifndef REVIT_BASE
const TokenKernels token_kernels = {
    {add_elements<float>, add_elements<BFloat16>, add_elements<Float16>, add_elements<double>},
    {sum_rows<float>, sum_rows<BFloat16>, sum_rows<Float16>, sum_rows<double>},
    {divide_elements<float>, divide_elements<BFloat16>, divide_elements<Float16>, divide_elements<double>},
};
#endif
