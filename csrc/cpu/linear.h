// Linear layers on packed weights: arguments and entry points.
#pragma once

#include <cstdint>

namespace revit::cpu {

enum class Activation : int { kNone = 0, kGelu, kGeluTanh, kSilu, kRelu, kQuickGelu };
inline constexpr int kActivations = 6;

// What happens to a finished sum plus its bias.
enum class Finish : int { kStore = 0, kActivate, kAdd, kMultiply };  // the last two: to, or with, what `out` holds

// Storage of a packed weight. Products with kInt8 are computed in integers, those with the others in float.
enum class WeightType : int { kFloat32 = 0, kBFloat16, kInt8 };
inline constexpr int kWeightTypes = 3;

// Depth of every chain but the last: the depth is cut into the fewest equal parts of at most `most`, in whole units.
inline int64_t chain_depth(int64_t depth, int64_t most, int64_t unit) {
  const int64_t n_chains = (depth + most - 1) / most;
  return ((depth + n_chains - 1) / n_chains + unit - 1) / unit * unit;
}

// Of int8 weights: the longest chain with one scale, and the unit. All instruction sets cut alike.
inline constexpr int64_t kMaxIntegerChain = 512;
inline constexpr int64_t kIntegerChainUnit = 64;

// A weight [N, depth] in panels of `panel` rows (see LinearKernels): panel p holds W[p * panel : (p + 1) * panel]
// transposed, [depth][panel], zero beyond N. In bfloat16 and int8 the values of d depths lie side by side in a lane of
// 32 bits, [depth / d][panel][d], and the depth is padded with zeros to whole cache lines of a column: 32 values of
// bfloat16, 64 of int8. d is 2 for bfloat16, and LinearKernels::integer_depths for int8 (widened lanes, if it is 2).
struct PackedWeight {
  WeightType type;
  const void* panels;
  const float* bias;  // [n_panels * panel]
  int64_t depth;
  int64_t n_panels;
  const float* scales;  // [n_panels * panel], for kInt8: W[n, k] is scales[n] times the integer
  // [n_chains][n_panels * panel], for kInt8 with four depths in a lane: -128 times the sum of a column's integers in a
  // chain. It takes off again what the rows have been raised by (see quantize.inl.h).
  const float* offsets;
};

// out[i, n] = finish(sum_k a[i, k] W[n, k] + bias[n]) for rows [0, n_rows) and the columns of panels
// [first_panel, end_panel). Rows are computed in whole half blocks (LinearKernels::half_block): `a` and `out` must have
// rows for them, with any content. For a kInt8 weight, `a` is rounded to integers first (see quantize.inl.h).
struct LinearTile {
  const float* a;
  int64_t a_stride;
  int64_t n_rows;
  PackedWeight weight;
  int64_t first_panel, end_panel;
  Finish finish;
  Activation activation;
  float* out;  // the column of the first panel
  int64_t out_stride;
};

struct LinearKernels {
  int64_t panel;       // columns of a panel
  int64_t half_block;  // rows are computed in multiples of this
  bool rounds;         // whether rows are rounded to bfloat16 for products with kBFloat16; else the weight is widened
  int integer_depths;  // depths in a lane of a kInt8 weight: 4 where bytes are multiplied, else 2
  // Indexed by WeightType. A row's result does not depend on the tile it is computed in.
  void (*tile[kWeightTypes])(const LinearTile&);
};

}  // namespace revit::cpu
