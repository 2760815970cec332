// Argument checks and the element-type mapping that every operator shares.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/types.h"

namespace revit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

inline cpu::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return cpu::DType::kFloat32;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    case ScalarType::Double:
      return cpu::DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
      return cpu::DType::kFloat32;
  }
}

// The type of the statistics and the log-sum-exp of `t`: float, or double for double.
inline ScalarType compute_type_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `t` itself if it is contiguous, else a contiguous copy.
inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Checks that `cu_seqlens` is a contiguous int32 CPU vector [B + 1] that starts at 0, never decreases and ends
// at `n_rows` or before it (rows beyond are padding). Returns B.
inline int64_t check_cu_seqlens(const Tensor& cu_seqlens, int64_t n_rows, const char* name) {
  STD_TORCH_CHECK(cu_seqlens.is_cpu(), name, " must be on the CPU, like the data");
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, name, " must be int32");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(), name,
                  " must be a contiguous vector [B + 1]");
  const int32_t* offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t batch = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(offsets[0] == 0, name, " must start at 0, got ", offsets[0]);
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(offsets[b] <= offsets[b + 1], name, " must not decrease, got ", offsets[b], " then ",
                    offsets[b + 1], " at position ", b);
  }
  STD_TORCH_CHECK(offsets[batch] <= n_rows, name, " ends at ", offsets[batch], ", beyond the ", n_rows,
                  " rows of the data");
  return batch;
}

// Checks that `length_index` is a contiguous int32 CPU vector [B] with values in [0, n_lengths).
inline void check_length_index(const Tensor& length_index, int64_t batch, int64_t n_lengths) {
  STD_TORCH_CHECK(length_index.is_cpu(), "length_index must be on the CPU, like the data");
  STD_TORCH_CHECK(length_index.scalar_type() == ScalarType::Int, "length_index must be int32");
  STD_TORCH_CHECK(length_index.dim() == 1 && length_index.size(0) == batch && length_index.is_contiguous(),
                  "length_index must be a contiguous vector [B = ", batch, "]");
  const int32_t* index = static_cast<const int32_t*>(length_index.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(index[b] >= 0 && index[b] < n_lengths, "length_index must be in [0, ", n_lengths, "), got ",
                    index[b], " for sequence ", b);
  }
}

// Checks that `pos_offset` is a contiguous int32 CPU vector [B] and that every sequence's patches lie within the table.
inline void check_pos_offset(const Tensor& pos_offset, const int32_t* cu_seqlens, int64_t batch, int64_t table_rows) {
  STD_TORCH_CHECK(pos_offset.is_cpu() && pos_offset.scalar_type() == ScalarType::Int && pos_offset.dim() == 1 &&
                      pos_offset.size(0) == batch && pos_offset.is_contiguous(),
                  "pos_offset must be a contiguous int32 CPU vector [B = ", batch, "]");
  const int32_t* offset = static_cast<const int32_t*>(pos_offset.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = cu_seqlens[b + 1] - cu_seqlens[b];
    STD_TORCH_CHECK(offset[b] >= 0 && offset[b] + n <= table_rows, "pos_offset of sequence ", b, " is ", offset[b],
                    ": its ", n, " patches must lie within the ", table_rows, " rows of pos_table");
  }
}

}  // namespace revit
