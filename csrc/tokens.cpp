// Assembly of the packed token sequence from patches, prefix tokens and position embeddings, and mean pooling.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "parallel.h"

namespace revit {
namespace {

const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2, name, " must be a CPU matrix");
}

void check_matrix_like(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == like.scalar_type() && t.size(1) == like.size(1),
                  name, " must be a CPU matrix with the dtype and the channels of the rows");
}

Tensor assemble_tokens(const Tensor& patches_in, const Tensor& prefix_in, const Tensor& pos_table_in,
                       const Tensor& pos_offset, const Tensor& cu_seqlens) {
  check_matrix(patches_in, "patches");
  check_matrix_like(prefix_in, patches_in, "prefix");
  check_matrix_like(pos_table_in, patches_in, "pos_table");
  const int64_t batch = check_cu_seqlens(cu_seqlens, patches_in.size(0), "cu_seqlens");
  const int32_t* begins = ints(cu_seqlens);
  check_pos_offset(pos_offset, begins, batch, pos_table_in.size(0));
  const int32_t* offsets = ints(pos_offset);
  const Tensor patches = revit::contiguous(patches_in), prefix = revit::contiguous(prefix_in);
  const Tensor pos_table = revit::contiguous(pos_table_in);
  const int64_t n_prefix = prefix.size(0), n_channels = patches.size(1);
  const int64_t n_rows = patches.size(0) + batch * n_prefix;
  Tensor tokens = torch::stable::new_empty(patches, {n_rows, n_channels});
  const int64_t row_bytes = n_channels * static_cast<int64_t>(patches.element_size());
  const void* patch_data = patches.const_data_ptr();
  const void* prefix_data = prefix.const_data_ptr();
  const void* pos_data = pos_table.const_data_ptr();
  void* token_data = tokens.mutable_data_ptr();
  const auto add = cpu::kernels().tokens.add[static_cast<int>(dtype_of(patches, "patches"))];
  for_each_task(
      batch,
      [&](int64_t b) {
        const int64_t begin = begins[b], n = begins[b + 1] - begin;
        char* out = at(token_data, (begin + b * n_prefix) * row_bytes);
        if (n_prefix * row_bytes > 0) std::memcpy(out, prefix_data, n_prefix * row_bytes);
        add({at(patch_data, begin * row_bytes), at(pos_data, offsets[b] * row_bytes), out + n_prefix * row_bytes,
             n * n_channels});
      },
      max_threads_for(n_rows * n_channels));
  const int64_t end = begins[batch] + batch * n_prefix;
  if ((n_rows - end) * row_bytes > 0) std::memset(at(token_data, end * row_bytes), 0, (n_rows - end) * row_bytes);
  return tokens;
}

std::tuple<Tensor, Tensor, Tensor> assemble_tokens_backward(const Tensor& grad_in, const Tensor& pos_table,
                                                            const Tensor& pos_offset, const Tensor& cu_seqlens,
                                                            int64_t n_prefix) {
  check_matrix(pos_table, "pos_table");
  check_matrix_like(grad_in, pos_table, "grad_tokens");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && n_prefix >= 0,
                  "cu_seqlens must be a vector [B + 1] and n_prefix must not be negative");
  const int64_t n_patches = grad_in.size(0) - (cu_seqlens.size(0) - 1) * n_prefix;
  const int64_t batch = check_cu_seqlens(cu_seqlens, n_patches, "cu_seqlens");
  const int32_t* begins = ints(cu_seqlens);
  check_pos_offset(pos_offset, begins, batch, pos_table.size(0));
  const int32_t* offsets = ints(pos_offset);
  const Tensor grad = revit::contiguous(grad_in);
  const int64_t n_channels = grad.size(1), table_rows = pos_table.size(0);
  Tensor grad_patches = torch::stable::new_empty(grad, {n_patches, n_channels});
  Tensor grad_prefix = torch::stable::new_empty(grad, {n_prefix, n_channels});
  Tensor grad_table = torch::stable::new_empty(grad, {table_rows, n_channels});
  const int64_t row_bytes = n_channels * static_cast<int64_t>(grad.element_size());
  const void* grad_data = grad.const_data_ptr();
  void* patch_data = grad_patches.mutable_data_ptr();
  void* prefix_data = grad_prefix.mutable_data_ptr();
  void* table_data = grad_table.mutable_data_ptr();
  const int64_t max_threads = max_threads_for(grad.size(0) * n_channels);

  for_each_task(
      batch,
      [&](int64_t b) {
        const int64_t begin = begins[b], n = begins[b + 1] - begin;
        if (n * row_bytes == 0) return;
        std::memcpy(at(patch_data, begin * row_bytes), at(grad_data, (begin + (b + 1) * n_prefix) * row_bytes),
                    n * row_bytes);
      },
      max_threads);
  const int64_t n_padding = n_patches - begins[batch];
  if (n_padding * row_bytes > 0) std::memset(at(patch_data, begins[batch] * row_bytes), 0, n_padding * row_bytes);

  // One task per row of prefix and table: it adds up, in order, the rows of the gradient that belong to its row.
  const auto sum_rows = cpu::kernels().tokens.sum_rows[static_cast<int>(dtype_of(grad, "grad_tokens"))];
  for_each_task(
      n_prefix + table_rows,
      [&](int64_t row) {
        std::vector<int64_t> rows;
        rows.reserve(batch);
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t first = begins[b] + b * n_prefix, n = begins[b + 1] - begins[b];
          const int64_t patch = row - n_prefix - offsets[b];
          if (row < n_prefix) rows.push_back(first + row);
          if (row >= n_prefix && patch >= 0 && patch < n) rows.push_back(first + n_prefix + patch);
        }
        char* out = row < n_prefix ? at(prefix_data, row * row_bytes) : at(table_data, (row - n_prefix) * row_bytes);
        sum_rows({grad_data, rows.data(), out, static_cast<int64_t>(rows.size()), n_channels, n_channels, 1});
      },
      max_threads);
  return {grad_patches, grad_prefix, grad_table};
}

Tensor mean_pool(const Tensor& x_in, const Tensor& cu_seqlens, int64_t skip) {
  check_matrix(x_in, "x");
  STD_TORCH_CHECK(skip >= 0, "skip must not be negative, got ", skip);
  const int64_t batch = check_cu_seqlens(cu_seqlens, x_in.size(0), "cu_seqlens");
  const int32_t* begins = ints(cu_seqlens);
  const Tensor x = revit::contiguous(x_in);
  const int64_t n_channels = x.size(1);
  Tensor out = torch::stable::new_empty(x, {batch, n_channels});
  const int64_t row_bytes = n_channels * static_cast<int64_t>(x.element_size());
  const void* x_data = x.const_data_ptr();
  void* out_data = out.mutable_data_ptr();
  const auto sum_rows = cpu::kernels().tokens.sum_rows[static_cast<int>(dtype_of(x, "x"))];
  for_each_task(
      batch,
      [&](int64_t b) {
        const int64_t n = std::max<int64_t>(0, begins[b + 1] - begins[b] - skip);
        const int64_t first = n > 0 ? begins[b] + skip : 0;
        sum_rows({at(x_data, first * row_bytes), nullptr, at(out_data, b * row_bytes), n, n_channels, n_channels,
                  std::max<int64_t>(n, 1)});
      },
      max_threads_for(x.size(0) * n_channels));
  return out;
}

Tensor mean_pool_backward(const Tensor& grad_in, const Tensor& cu_seqlens, int64_t skip, int64_t n_rows) {
  check_matrix(grad_in, "grad_out");
  STD_TORCH_CHECK(skip >= 0, "skip must not be negative, got ", skip);
  const int64_t batch = check_cu_seqlens(cu_seqlens, n_rows, "cu_seqlens");
  STD_TORCH_CHECK(grad_in.size(0) == batch, "grad_out must have one row for each of the ", batch, " sequences");
  const int32_t* begins = ints(cu_seqlens);
  const Tensor grad = revit::contiguous(grad_in);
  const int64_t n_channels = grad.size(1);
  Tensor grad_x = torch::stable::new_empty(grad, {n_rows, n_channels});
  const int64_t row_bytes = n_channels * static_cast<int64_t>(grad.element_size());
  if (n_rows * row_bytes == 0) return grad_x;
  const void* grad_data = grad.const_data_ptr();
  void* x_data = grad_x.mutable_data_ptr();
  const auto divide = cpu::kernels().tokens.divide[static_cast<int>(dtype_of(grad, "grad_out"))];
  for_each_task(
      batch,
      [&](int64_t b) {
        const int64_t begin = begins[b], end = begins[b + 1], kept = begin + std::min(skip, end - begin);
        std::memset(at(x_data, begin * row_bytes), 0, (kept - begin) * row_bytes);
        if (kept == end) return;
        char* first = at(x_data, kept * row_bytes);
        divide({at(grad_data, b * row_bytes), first, n_channels, end - kept});
        for (int64_t row = kept + 1; row < end; ++row) std::memcpy(at(x_data, row * row_bytes), first, row_bytes);
      },
      max_threads_for(n_rows * n_channels));
  std::memset(at(x_data, begins[batch] * row_bytes), 0, (n_rows - begins[batch]) * row_bytes);
  return grad_x;
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CPU, m) {
  m.impl("assemble_tokens", TORCH_BOX(&revit::assemble_tokens));
  m.impl("assemble_tokens_backward", TORCH_BOX(&revit::assemble_tokens_backward));
  m.impl("mean_pool", TORCH_BOX(&revit::mean_pool));
  m.impl("mean_pool_backward", TORCH_BOX(&revit::mean_pool_backward));
}
