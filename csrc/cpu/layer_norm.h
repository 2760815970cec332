// LayerNorm and RMSNorm over runs of rows that share one set of affine parameters, forward and backward.
//
// A null `bias` in the forward pass, or `mean` in the backward pass, means RMSNorm: rows are not centred.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace revit::cpu {

// All rows are contiguous: row r of a [n_rows, n_channels] array starts at r * n_channels. "Compute" is the type that
// the rows are computed in: float, or double for double.
struct LayerNormArgs {
  const void* x;
  const void* residual;  // null: none is added
  const void* weight;    // [n_channels], compute
  const void* bias;      // [n_channels], compute; null: RMSNorm, which has no `mean` either
  void* y;
  void* sum;      // x + residual, rounded to the type of x; used where residual is given
  void* mean;     // [n_rows], compute
  void* rstd;     // [n_rows], compute
  void* scratch;  // [n_channels], compute
  int64_t n_rows;
  int64_t n_channels;
  double eps;
  bool streams_sum;  // `sum` is not read again soon, so it should not displace what is in the caches
};

inline constexpr int64_t kLayerNormBackwardScratchRows = 10;

struct LayerNormBackwardArgs {
  const void* grad_y;
  const void* grad_sum;  // null: zero
  const void* x;         // what was normalised: x, or x + residual
  const void* weight;    // [n_channels], compute
  const void* mean;      // null: RMSNorm, which has no `grad_bias` either
  const void* rstd;
  void* grad_x;
  void* grad_weight;  // [n_channels], compute: the sum over these rows, overwritten
  void* grad_bias;    // [n_channels], compute: the sum over these rows, overwritten
  void* scratch;      // [kLayerNormBackwardScratchRows, n_channels], compute
  int64_t n_rows;
  int64_t n_channels;
};

// Adds parts [n_parts][2][n_channels] (compute; weight, then bias) in order. Null `grad_bias`: only those of the
// weight.
struct LayerNormReduceArgs {
  const void* parts;
  void* grad_weight;
  void* grad_bias;
  int64_t n_parts;
  int64_t n_channels;
};

// Converts n elements to their compute type.
struct WidenArgs {
  const void* in;
  void* out;
  int64_t n;
};

// `forward` and `backward` are indexed by the DType of the rows, `reduce` and `widen` by that of the affine parameters.
struct LayerNormKernels {
  void (*forward[kDTypes])(const LayerNormArgs&);
  void (*backward[kDTypes])(const LayerNormBackwardArgs&);
  void (*reduce[kDTypes])(const LayerNormReduceArgs&);
  void (*widen[kDTypes])(const WidenArgs&);
};

}  // namespace revit::cpu
