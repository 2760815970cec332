// LayerNorm and RMSNorm on ragged sizes against a scalar loop in double.
#include <cmath>
#include <cstdint>
#include <vector>

#include "native_test.h"

namespace native {
namespace {

using revit::cpu::DType;

double value(int64_t i) { return std::sin(0.7 * static_cast<double>(i)) * 2 + 0.3; }

template <class T>
std::vector<T> values(int64_t n, int64_t seed) {
  std::vector<T> out(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = static_cast<T>(value(i * 3 + seed));
  return out;
}

template <class T>
void test_rows(const revit::cpu::Kernels& kernels, DType dtype, int64_t n_rows, int64_t n_channels, bool with_residual,
               bool rms) {
  const double eps = 1e-5, tolerance = sizeof(T) == 8 ? 1e-9 : 1e-3;
  const int d = static_cast<int>(dtype);
  const int64_t n = n_rows * n_channels;
  const auto x = values<T>(n, 1), residual = values<T>(n, 2), weight = values<T>(n_channels, 3);
  const auto bias = values<T>(n_channels, 4), grad_y = values<T>(n, 5), grad_sum = values<T>(n, 6);
  std::vector<T> y(x.size()), sum(with_residual ? x.size() : 0), mean(static_cast<size_t>(n_rows)), rstd(mean);
  std::vector<T> scratch(static_cast<size_t>(revit::cpu::kLayerNormBackwardScratchRows * n_channels));
  kernels.layer_norm.forward[d]({x.data(), with_residual ? residual.data() : nullptr, weight.data(),
                                 rms ? nullptr : bias.data(), y.data(), sum.data(), rms ? nullptr : mean.data(),
                                 rstd.data(), scratch.data(), n_rows, n_channels, eps, true});
  const std::vector<T>& normed = with_residual ? sum : x;
  std::vector<T> grad_x(x.size()), parts(static_cast<size_t>(2 * n_channels));
  kernels.layer_norm.backward[d]({grad_y.data(), with_residual ? grad_sum.data() : nullptr, normed.data(),
                                  weight.data(), rms ? nullptr : mean.data(), rstd.data(), grad_x.data(), parts.data(),
                                  rms ? nullptr : parts.data() + n_channels, scratch.data(), n_rows, n_channels});
  std::vector<T> grad_weight(weight.size()), grad_bias(weight.size());
  kernels.layer_norm.reduce[d]({parts.data(), grad_weight.data(), rms ? nullptr : grad_bias.data(), 1, n_channels});

  std::vector<double> true_weight(weight.size(), 0), true_bias(weight.size(), 0);
  double worst = 0;
  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t at = r * n_channels;
    std::vector<double> s(weight.size()), h(weight.size());
    double m = 0, v = 0, mean_h = 0, mean_hx = 0;
    for (int64_t c = 0; c < n_channels; ++c) {
      s[c] = static_cast<T>(x[at + c] + (with_residual ? residual[at + c] : T(0)));
      if (with_residual) worst = std::fmax(worst, std::fabs(s[c] - sum[at + c]));
      if (!rms) m += s[c] / n_channels;
    }
    for (int64_t c = 0; c < n_channels; ++c) v += (s[c] - m) * (s[c] - m) / n_channels;
    const double scale = 1 / std::sqrt(v + eps);
    for (int64_t c = 0; c < n_channels; ++c) {
      const double xhat = (s[c] - m) * scale;
      worst = std::fmax(worst, std::fabs(xhat * weight[c] + (rms ? T(0) : bias[c]) - y[at + c]));
      h[c] = static_cast<double>(grad_y[at + c]) * weight[c];
      if (!rms) mean_h += h[c] / n_channels;
      mean_hx += h[c] * xhat / n_channels;
      true_weight[c] += grad_y[at + c] * xhat;
      if (!rms) true_bias[c] += grad_y[at + c];
    }
    for (int64_t c = 0; c < n_channels; ++c) {
      const double xhat = (s[c] - m) * scale;
      const double expected = (h[c] - mean_h - xhat * mean_hx) * scale + (with_residual ? grad_sum[at + c] : 0);
      worst = std::fmax(worst, std::fabs(expected - grad_x[at + c]));
    }
  }
  for (int64_t c = 0; c < n_channels; ++c) {
    worst = std::fmax(worst, std::fabs(true_weight[c] - grad_weight[c]));
    worst = std::fmax(worst, std::fabs(true_bias[c] - grad_bias[c]));
  }
  CHECK(worst < tolerance);
}

// 16-bit rows, whose rounding the Python tests examine: here only that nothing outside the buffers is touched, and
// that a row of equal numbers becomes the bias.
void test_16_bit(const revit::cpu::Kernels& kernels, DType dtype, int64_t n_channels) {
  const uint16_t one = dtype == DType::kBFloat16 ? 0x3f80 : 0x3c00;
  const size_t n = static_cast<size_t>(n_channels);
  std::vector<uint16_t> x(3 * n, one), y(3 * n), sum(3 * n), grad_x(3 * n), grad(n), param(n, one);
  std::vector<float> mean(3), rstd(3), parts(2 * n), wide(n), scratch(n);
  std::vector<float> backward_scratch(static_cast<size_t>(revit::cpu::kLayerNormBackwardScratchRows) * n);
  const int d = static_cast<int>(dtype);
  kernels.layer_norm.widen[d]({param.data(), wide.data(), n_channels});
  CHECK(wide[n - 1] == 1.0f);
  kernels.layer_norm.forward[d]({x.data(), x.data(), wide.data(), wide.data(), y.data(), sum.data(), mean.data(),
                                 rstd.data(), scratch.data(), 3, n_channels, 1e-6, true});
  bool equal = true;
  for (uint16_t bits : y) equal = equal && bits == one;
  CHECK(equal);
  CHECK(mean[2] == 2.0f);
  kernels.layer_norm.backward[d]({x.data(), x.data(), sum.data(), wide.data(), mean.data(), rstd.data(), grad_x.data(),
                                  parts.data(), parts.data() + n_channels, backward_scratch.data(), 3, n_channels});
  CHECK(parts[2 * n - 1] == 3.0f);
  kernels.layer_norm.reduce[d]({parts.data(), grad.data(), grad.data(), 1, n_channels});
}

}  // namespace

void test_layer_norm(const revit::cpu::Kernels& kernels) {
  for (int64_t n_channels : {1, 2, 7, 16, 31, 67, 150}) {
    for (bool with_residual : {false, true}) {
      for (bool rms : {false, true}) {
        test_rows<double>(kernels, DType::kFloat64, 5, n_channels, with_residual, rms);
        // Of one or two channels the gradient is small beside the rounding of what it is the difference of.
        if (n_channels > 2) test_rows<float>(kernels, DType::kFloat32, 5, n_channels, with_residual, rms);
      }
    }
    test_16_bit(kernels, DType::kBFloat16, n_channels);
    test_16_bit(kernels, DType::kFloat16, n_channels);
  }
}

}  // namespace native
