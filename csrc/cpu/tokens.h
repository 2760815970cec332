// Row arithmetic behind token assembly and mean pooling.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace revit::cpu {

// out[i] = a[i] + b[i]
struct AddArgs {
  const void* a;
  const void* b;
  void* out;
  int64_t n;
};

// out[c] = (sum over i in [0, n_rows) of x[row(i)][c]) / divisor, for n_channels channels. Rows are `stride` elements
// apart; row(i) is rows[i], or i if `rows` is null. Without rows the result is zero.
struct SumRowsArgs {
  const void* x;
  const int64_t* rows;
  void* out;
  int64_t n_rows;
  int64_t stride;
  int64_t n_channels;
  int64_t divisor;
};

// out[i] = x[i] / divisor
struct DivideArgs {
  const void* x;
  void* out;
  int64_t n;
  int64_t divisor;
};

// Indexed by DType.
struct TokenKernels {
  void (*add[kDTypes])(const AddArgs&);
  void (*sum_rows[kDTypes])(const SumRowsArgs&);
  void (*divide[kDTypes])(const DivideArgs&);
};

}  // namespace revit::cpu
