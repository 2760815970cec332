// Packed weights and activations as the engine's ops take them.
#pragma once

#include <cstdint>
#include <string>

#include "checks.h"
#include "cpu/kernels.h"

namespace revit {

// The weight [n_out, depth] that is packed in `panels` (see cpu/linear.h), with its bias: a vector [N], or for int8
// panels [2, N], the bias and then the scales of the columns, followed by the offsets of all chains if there are any.
inline cpu::PackedWeight packed_weight(const Tensor& panels, const Tensor& bias, int64_t n_out, int64_t depth,
                                       const char* name) {
  STD_TORCH_CHECK(depth >= 1, name, ": a weight has at least one column");
  const cpu::LinearKernels& kernels = cpu::kernels().linear;
  const int64_t panel = kernels.panel;
  const int64_t n_panels = (n_out + panel - 1) / panel;
  const bool integer = panels.scalar_type() == ScalarType::Char;
  const bool narrow = integer || panels.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(panels.is_cpu() && (narrow || panels.scalar_type() == ScalarType::Float) && panels.is_contiguous(),
                  name, ": panels must be a contiguous float32, bfloat16 or int8 CPU tensor");
  const int64_t line = integer ? 64 : 32, depths = integer ? kernels.integer_depths : 2;
  const bool fits = narrow ? panels.dim() == 4 && panels.size(1) == (depth + line - 1) / line * line / depths &&
                                 panels.size(3) == depths
                           : panels.dim() == 3 && panels.size(1) == depth;
  STD_TORCH_CHECK(fits && panels.size(0) == n_panels && panels.size(2) == panel, name,
                  ": panels must be those of a weight [", n_out, ", ", depth, "] for the instruction set in use, ",
                  cpu::kernels().isa, " (", panel, " columns a panel, ", kernels.integer_depths,
                  " int8 values a lane); pack it again");
  const int64_t n_columns = n_panels * panel;
  const int64_t chain = cpu::chain_depth(depth, cpu::kMaxIntegerChain, cpu::kIntegerChainUnit);
  const int64_t n_rows = 2 + (depths == 4 ? (depth + chain - 1) / chain : 0);
  STD_TORCH_CHECK(bias.is_cpu() && bias.scalar_type() == ScalarType::Float && bias.is_contiguous() &&
                      (integer ? bias.dim() == 2 && bias.size(0) == n_rows : bias.dim() == 1) &&
                      bias.size(bias.dim() - 1) == n_columns,
                  name, ": bias must be contiguous float32 [", integer ? std::to_string(n_rows) + ", " : "", n_columns,
                  "], zero beyond ", n_out);
  const float* data = static_cast<const float*>(bias.const_data_ptr());
  const cpu::WeightType type = integer  ? cpu::WeightType::kInt8
                               : narrow ? cpu::WeightType::kBFloat16
                                        : cpu::WeightType::kFloat32;
  return {type,
          panels.const_data_ptr(),
          data,
          depth,
          n_panels,
          integer ? data + n_columns : nullptr,
          integer ? data + 2 * n_columns : nullptr};
}

inline cpu::Activation activation_of(int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < cpu::kActivations, "activation must be in [0, ", cpu::kActivations,
                  "), got ", activation);
  return static_cast<cpu::Activation>(activation);
}

// Computes the linear layer of `tile` in pieces of rows and panels that keep all threads busy.
void share_linear(const cpu::LinearTile& tile);

}  // namespace revit
