// Row arithmetic on ragged sizes against a scalar loop in double.
#include <cmath>
#include <cstdint>
#include <vector>

#include "native_test.h"

namespace native {
namespace {

using revit::cpu::DType;

template <class T>
void test_numbers(const revit::cpu::Kernels& kernels, DType dtype, int64_t n_rows, int64_t n_channels) {
  const int d = static_cast<int>(dtype);
  const double tolerance = sizeof(T) == 8 ? 1e-13 : 1e-6;
  const size_t n = static_cast<size_t>(n_rows * n_channels);
  std::vector<T> x(n), b(n), out(n), sums(static_cast<size_t>(n_channels));
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<T>(std::sin(0.3 * i)), b[i] = static_cast<T>(std::cos(0.2 * i));
  double worst = 0;
  kernels.tokens.add[d]({x.data(), b.data(), out.data(), static_cast<int64_t>(n)});
  for (size_t i = 0; i < n; ++i) worst = std::fmax(worst, std::fabs(static_cast<double>(x[i]) + b[i] - out[i]));
  kernels.tokens.divide[d]({x.data(), out.data(), static_cast<int64_t>(n), 3});
  for (size_t i = 0; i < n; ++i) worst = std::fmax(worst, std::fabs(static_cast<double>(x[i]) / 3 - out[i]));

  std::vector<int64_t> backwards(static_cast<size_t>(n_rows));
  for (int64_t r = 0; r < n_rows; ++r) backwards[static_cast<size_t>(r)] = n_rows - 1 - r;
  for (const int64_t* rows : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(backwards.data())}) {
    const int64_t divisor = n_rows > 0 ? n_rows : 1;
    kernels.tokens.sum_rows[d]({x.data(), rows, sums.data(), n_rows, n_channels, n_channels, divisor});
    for (int64_t c = 0; c < n_channels; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < n_rows; ++r) sum += x[static_cast<size_t>(r * n_channels + c)];
      worst = std::fmax(worst, std::fabs(sum / static_cast<double>(divisor) - sums[static_cast<size_t>(c)]));
    }
  }
  CHECK(worst < tolerance);
}

// Sums and quotients of ones, which every 16-bit type represents.
void test_16_bit(const revit::cpu::Kernels& kernels, DType dtype, int64_t n_channels) {
  const int d = static_cast<int>(dtype);
  const uint16_t one = dtype == DType::kBFloat16 ? 0x3f80 : 0x3c00, two = 0x4000;
  const size_t n = static_cast<size_t>(n_channels);
  std::vector<uint16_t> x(2 * n, one), added(2 * n), mean(n), halved(n);
  kernels.tokens.add[d]({x.data(), x.data(), added.data(), 2 * n_channels});
  kernels.tokens.sum_rows[d]({x.data(), nullptr, mean.data(), 2, n_channels, n_channels, 2});
  kernels.tokens.divide[d]({added.data(), halved.data(), n_channels, 2});
  bool equal = true;
  for (size_t i = 0; i < n; ++i) equal = equal && added[i] == two && mean[i] == one && halved[i] == one;
  CHECK(equal);
}

}  // namespace

void test_tokens(const revit::cpu::Kernels& kernels) {
  for (int64_t n_channels : {1, 7, 16, 31, 67, 150}) {
    for (int64_t n_rows : {0, 1, 8, 21}) {
      test_numbers<float>(kernels, DType::kFloat32, n_rows, n_channels);
      test_numbers<double>(kernels, DType::kFloat64, n_rows, n_channels);
    }
    test_16_bit(kernels, DType::kBFloat16, n_channels);
    test_16_bit(kernels, DType::kFloat16, n_channels);
  }
}

}  // namespace native
