// LayerNorm over runs of rows that share one set of affine parameters, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace revit::cpu {

// All rows are contiguous: row r of a [n_rows, n_channels] array starts at r * n_channels.
struct LayerNormArgs {
  const void* x;
  const void* residual;  // null: none is added
  const void* weight;    // [n_channels]
  const void* bias;      // [n_channels]
  void* y;
  void* sum;   // x + residual, rounded to the type of x; used where residual is given
  void* mean;  // [n_rows], compute type
  void* rstd;  // [n_rows], compute type
  int64_t n_rows;
  int64_t n_channels;
  double eps;
};

struct LayerNormBackwardArgs {
  const void* grad_y;
  const void* grad_sum;  // null: zero
  const void* x;         // what was normalised: x, or x + residual
  const void* weight;
  const void* mean;
  const void* rstd;
  void* grad_x;
  void* grad_weight;  // [n_channels], compute type: the part of these rows, written
  void* grad_bias;    // [n_channels], compute type: the part of these rows, written
  int64_t n_rows;
  int64_t n_channels;
};

// Adds parts [n_parts][2][n_channels] (compute type; weight, then bias) in order.
struct LayerNormReduceArgs {
  const void* parts;
  void* grad_weight;
  void* grad_bias;
  int64_t n_parts;
  int64_t n_channels;
};

// Type of the affine parameters: that of the rows, or the type they are computed in.
enum class ParamType : int { kLikeRows = 0, kCompute = 1 };
inline constexpr int kParamTypes = 2;

// Indexed by the DType of the rows, then by the ParamType of weight and bias.
struct LayerNormKernels {
  void (*forward[kDTypes][kParamTypes])(const LayerNormArgs&);
  void (*backward[kDTypes][kParamTypes])(const LayerNormBackwardArgs&);
  void (*reduce[kDTypes][kParamTypes])(const LayerNormReduceArgs&);
};

}  // namespace revit::cpu
