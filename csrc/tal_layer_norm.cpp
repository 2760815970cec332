// Token-length-aware LayerNorm: every sequence is normalised with the affine parameters of its own length. Without a
// bias it is RMSNorm, which has no mean either.
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "parallel.h"

namespace revit {
namespace {

// Rows over which one task sums grad_weight and grad_bias. The number is fixed, so that the order of all additions does
// not depend on the number of threads.
constexpr int64_t kPartRows = 64;

// From this size on the sum with the residual is written past the caches. It is read only after the next matrix
// products, which displace it anyway.
constexpr int64_t kStreamedBytes = 1 << 20;

struct Layout {
  cpu::DType dtype;
  cpu::DType param_dtype;
  int64_t n_rows;
  int64_t n_channels;
  int64_t batch;
  const int32_t* cu_seqlens;
  const int32_t* length_index;
};

void check_rows(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == like.scalar_type() && t.size(0) == like.size(0) &&
                      t.size(1) == like.size(1),
                  name, " must have the shape, dtype and device of x");
}

Layout check_layout(const Tensor& x, const Tensor& weight, const Tensor& cu_seqlens, const Tensor& length_index) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(1) >= 1, "x must be a CPU tensor [T, C] with C >= 1");
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == x.size(1),
                  "weight must be a CPU tensor [n_lengths, C = ", x.size(1), "]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == compute_type_of(x),
                  "weight must have the dtype of x, or be float32 for bfloat16 and float16");
  const int64_t batch = check_cu_seqlens(cu_seqlens, x.size(0), "cu_seqlens");
  check_length_index(length_index, batch, weight.size(0));
  return {dtype_of(x, "x"),
          dtype_of(weight, "weight"),
          x.size(0),
          x.size(1),
          batch,
          static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
          static_cast<const int32_t*>(length_index.const_data_ptr())};
}

template <class Pointer>
Pointer offset(Pointer p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return p == nullptr ? nullptr : static_cast<Byte*>(p) + bytes;
}

// Affine parameters [n_lengths, C] in compute type: the data of `t`, or a widened copy in `storage`.
const void* widened(const Tensor& t, cpu::DType dtype, std::vector<float>* storage) {
  if (dtype == cpu::DType::kFloat32 || dtype == cpu::DType::kFloat64) return t.const_data_ptr();
  storage->resize(static_cast<size_t>(t.numel()));
  cpu::kernels().layer_norm.widen[static_cast<int>(dtype)]({t.const_data_ptr(), storage->data(), t.numel()});
  return storage->data();
}

struct Outputs {
  Tensor y, sum, mean, rstd;
};

Outputs forward(const Tensor& x_in, const Tensor* residual_in, const Tensor& weight_in,
                const std::optional<Tensor>& bias_in, const Tensor& cu_seqlens, const Tensor& length_index,
                double eps) {
  const Layout layout = check_layout(x_in, weight_in, cu_seqlens, length_index);
  STD_TORCH_CHECK(eps >= 0, "eps must be a number that is not negative, got ", eps);
  STD_TORCH_CHECK(
      !bias_in || (bias_in->is_cpu() && bias_in->dim() == 2 && bias_in->scalar_type() == weight_in.scalar_type() &&
                   bias_in->size(0) == weight_in.size(0) && bias_in->size(1) == weight_in.size(1)),
      "bias must have the shape, dtype and device of weight");
  if (residual_in != nullptr) check_rows(*residual_in, x_in, "residual");
  const Tensor x = revit::contiguous(x_in), weight = revit::contiguous(weight_in);
  const Tensor bias = bias_in ? revit::contiguous(*bias_in) : Tensor();
  const Tensor residual = residual_in != nullptr ? revit::contiguous(*residual_in) : Tensor();
  const ScalarType compute = compute_type_of(x);
  const int64_t row_bytes = layout.n_channels * static_cast<int64_t>(x.element_size());
  Outputs out;
  out.y = torch::stable::new_empty(x, {layout.n_rows, layout.n_channels});
  if (residual_in != nullptr) out.sum = torch::stable::new_empty(x, {layout.n_rows, layout.n_channels});
  out.mean = torch::stable::new_empty(x, {bias_in ? layout.n_rows : 0}, compute);
  out.rstd = torch::stable::new_empty(x, {layout.n_rows}, compute);
  const int64_t stat_bytes = static_cast<int64_t>(out.mean.element_size());
  const int64_t wide_row_bytes = layout.n_channels * stat_bytes;

  const void* x_data = x.const_data_ptr();
  const void* residual_data = residual_in != nullptr ? residual.const_data_ptr() : nullptr;
  std::vector<float> wide_weight, wide_bias;
  const void* weight_data = widened(weight, layout.param_dtype, &wide_weight);
  const void* bias_data = bias_in ? widened(bias, layout.param_dtype, &wide_bias) : nullptr;
  void* y_data = out.y.mutable_data_ptr();
  void* sum_data = residual_in != nullptr ? out.sum.mutable_data_ptr() : nullptr;
  void* mean_data = bias_in ? out.mean.mutable_data_ptr() : nullptr;
  void* rstd_data = out.rstd.mutable_data_ptr();
  const auto kernel = cpu::kernels().layer_norm.forward[static_cast<int>(layout.dtype)];
  const bool streams_sum = layout.n_rows * row_bytes >= kStreamedBytes;

  // A row's result depends on that row alone, so tasks are runs of rows that ignore where sequences end.
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / layout.n_channels);
  const int64_t n_tasks = (layout.n_rows + task_rows - 1) / task_rows;
  for_each_task(n_tasks, [&](int64_t task) {
    std::vector<double> scratch(static_cast<size_t>(layout.n_channels));  // room for either compute type
    int64_t row = task * task_rows;
    const int64_t end = std::min(row + task_rows, layout.n_rows);
    int64_t b = std::upper_bound(layout.cu_seqlens, layout.cu_seqlens + layout.batch + 1, row) - layout.cu_seqlens - 1;
    for (; row < end && b < layout.batch; ++b) {
      const int64_t n = std::min<int64_t>(end, layout.cu_seqlens[b + 1]) - row;
      if (n == 0) continue;
      const int64_t index = layout.length_index[b];
      kernel({offset(x_data, row * row_bytes), offset(residual_data, row * row_bytes),
              offset(weight_data, index * wide_row_bytes), offset(bias_data, index * wide_row_bytes),
              offset(y_data, row * row_bytes), offset(sum_data, row * row_bytes), offset(mean_data, row * stat_bytes),
              offset(rstd_data, row * stat_bytes), scratch.data(), n, layout.n_channels, eps, streams_sum});
      row += n;
    }
    if (row < end) {
      const size_t n = static_cast<size_t>(end - row);
      std::memset(offset(y_data, row * row_bytes), 0, n * row_bytes);
      if (sum_data != nullptr) std::memset(offset(sum_data, row * row_bytes), 0, n * row_bytes);
      if (mean_data != nullptr) std::memset(offset(mean_data, row * stat_bytes), 0, n * stat_bytes);
      std::memset(offset(rstd_data, row * stat_bytes), 0, n * stat_bytes);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> tal_layer_norm(const Tensor& x, const Tensor& weight,
                                                  const std::optional<Tensor>& bias, const Tensor& cu_seqlens,
                                                  const Tensor& length_index, double eps,
                                                  const std::optional<Tensor>& tiles) {
  Outputs out = forward(x, nullptr, weight, bias, cu_seqlens, length_index, eps);
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tal_layer_norm_residual(const Tensor& x, const Tensor& residual,
                                                                   const Tensor& weight,
                                                                   const std::optional<Tensor>& bias,
                                                                   const Tensor& cu_seqlens, const Tensor& length_index,
                                                                   double eps, const std::optional<Tensor>& tiles) {
  Outputs out = forward(x, &residual, weight, bias, cu_seqlens, length_index, eps);
  return {out.y, out.sum, out.mean, out.rstd};
}

// At most kPartRows consecutive rows of one length.
struct Part {
  int64_t first_row;
  int64_t n_rows;
  int64_t length;
};

// All parts, ordered by length and then by row; `begin[l]` is the first of length l.
std::vector<Part> parts_of(const Layout& layout, int64_t n_lengths, std::vector<int64_t>* begin) {
  std::vector<Part> parts;
  for (int64_t b = 0; b < layout.batch;) {
    const int64_t length = layout.length_index[b], first = layout.cu_seqlens[b];
    while (b < layout.batch && layout.length_index[b] == length) ++b;
    for (int64_t row = first, end = layout.cu_seqlens[b]; row < end; row += kPartRows) {
      parts.push_back({row, std::min(kPartRows, end - row), length});
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.length < b.length; });
  begin->assign(n_lengths + 1, 0);
  for (const Part& part : parts) ++(*begin)[part.length + 1];
  for (int64_t l = 0; l < n_lengths; ++l) (*begin)[l + 1] += (*begin)[l];
  return parts;
}

std::tuple<Tensor, Tensor, Tensor> tal_layer_norm_backward(const Tensor& grad_y_in,
                                                           const std::optional<Tensor>& grad_sum_in, const Tensor& x_in,
                                                           const Tensor& weight_in,
                                                           const std::optional<Tensor>& mean_in, const Tensor& rstd_in,
                                                           const Tensor& cu_seqlens, const Tensor& length_index,
                                                           const std::optional<Tensor>& tiles) {
  const Layout layout = check_layout(x_in, weight_in, cu_seqlens, length_index);
  const ScalarType compute = compute_type_of(x_in);
  check_rows(grad_y_in, x_in, "grad_y");
  if (grad_sum_in) check_rows(*grad_sum_in, x_in, "grad_sum");
  const auto is_statistic = [&](const Tensor& t) {
    return t.is_cpu() && t.dim() == 1 && t.size(0) == layout.n_rows && t.scalar_type() == compute;
  };
  STD_TORCH_CHECK((!mean_in || is_statistic(*mean_in)) && is_statistic(rstd_in),
                  "mean and rstd must be what the forward returned; without a bias there is no mean");
  const Tensor x = revit::contiguous(x_in), weight = revit::contiguous(weight_in),
               grad_y = revit::contiguous(grad_y_in);
  const Tensor mean = mean_in ? revit::contiguous(*mean_in) : Tensor(), rstd = revit::contiguous(rstd_in);
  const Tensor grad_sum = grad_sum_in ? revit::contiguous(*grad_sum_in) : Tensor();
  const int64_t n_lengths = weight.size(0), n_channels = layout.n_channels;
  std::vector<int64_t> begin;
  const std::vector<Part> parts = parts_of(layout, n_lengths, &begin);
  Tensor grad_x = torch::stable::new_empty(x, {layout.n_rows, n_channels});
  Tensor grad_weight = torch::stable::new_empty(weight, {n_lengths, n_channels});
  Tensor grad_bias =
      mean_in ? torch::stable::new_empty(weight, {n_lengths, n_channels}) : torch::stable::new_empty(weight, {0});
  Tensor sums = torch::stable::new_empty(x, {static_cast<int64_t>(parts.size()), 2, n_channels}, compute);

  const int64_t row_bytes = n_channels * static_cast<int64_t>(x.element_size());
  const int64_t param_bytes = n_channels * static_cast<int64_t>(weight.element_size());
  const int64_t stat_bytes = static_cast<int64_t>(rstd.element_size());
  const int64_t sum_bytes = n_channels * stat_bytes;
  const void* grad_y_data = grad_y.const_data_ptr();
  const void* grad_sum_data = grad_sum_in ? grad_sum.const_data_ptr() : nullptr;
  const void* x_data = x.const_data_ptr();
  std::vector<float> wide_weight;
  const void* weight_data = widened(weight, layout.param_dtype, &wide_weight);
  const void* mean_data = mean_in ? mean.const_data_ptr() : nullptr;
  const void* rstd_data = rstd.const_data_ptr();
  void* grad_x_data = grad_x.mutable_data_ptr();
  void* grad_weight_data = grad_weight.mutable_data_ptr();
  void* grad_bias_data = mean_in ? grad_bias.mutable_data_ptr() : nullptr;
  void* sums_data = sums.mutable_data_ptr();

  const cpu::LayerNormKernels& kernels = cpu::kernels().layer_norm;
  const auto backward = kernels.backward[static_cast<int>(layout.dtype)];
  const auto reduce = kernels.reduce[static_cast<int>(layout.param_dtype)];
  const int64_t max_threads = max_threads_for(layout.n_rows * n_channels);
  for_each_task(
      static_cast<int64_t>(parts.size()),
      [&](int64_t i) {
        const Part& part = parts[i];
        const int64_t at = part.first_row;
        std::vector<double> scratch(cpu::kLayerNormBackwardScratchRows * n_channels);  // room for either compute type
        backward({offset(grad_y_data, at * row_bytes), offset(grad_sum_data, at * row_bytes),
                  offset(x_data, at * row_bytes), offset(weight_data, part.length * sum_bytes),
                  offset(mean_data, at * stat_bytes), offset(rstd_data, at * stat_bytes),
                  offset(grad_x_data, at * row_bytes), offset(sums_data, 2 * i * sum_bytes),
                  offset(sums_data, (2 * i + 1) * sum_bytes), scratch.data(), part.n_rows, n_channels});
      },
      max_threads);
  for_each_task(
      n_lengths,
      [&](int64_t length) {
        reduce({offset(sums_data, 2 * begin[length] * sum_bytes), offset(grad_weight_data, length * param_bytes),
                offset(grad_bias_data, length * param_bytes), begin[length + 1] - begin[length], n_channels});
      },
      max_threads);
  const int64_t end = layout.cu_seqlens[layout.batch];
  if (end < layout.n_rows) std::memset(offset(grad_x_data, end * row_bytes), 0, (layout.n_rows - end) * row_bytes);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CPU, m) {
  m.impl("tal_layer_norm", TORCH_BOX(&revit::tal_layer_norm));
  m.impl("tal_layer_norm_residual", TORCH_BOX(&revit::tal_layer_norm_residual));
  m.impl("tal_layer_norm_backward", TORCH_BOX(&revit::tal_layer_norm_backward));
}
