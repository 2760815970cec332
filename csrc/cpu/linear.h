// Linear layers on packed weights: arguments and entry points.
#pragma once

#include <cstdint>

namespace revit::cpu {

enum class Activation : int { kNone = 0, kGelu, kGeluTanh, kSilu, kRelu, kQuickGelu };
inline constexpr int kActivations = 6;

// What happens to a finished sum plus its bias.
enum class Finish : int { kStore = 0, kActivate, kAdd };  // kAdd: added to what `out` holds

// Storage of a packed weight. Products with kInt8 are computed in integers, those with the others in float.
enum class WeightType : int { kFloat32 = 0, kBFloat16, kInt8 };
inline constexpr int kWeightTypes = 3;

// A weight [N, depth] in panels of `panel` rows (see LinearKernels): panel p holds W[p * panel : (p + 1) * panel]
// transposed, [depth][panel], zero beyond N. In bfloat16 and int8 the values of two depths are side by side,
// [ceil(depth / 2)][panel][2], so that one 32-bit lane holds both (int8 after it is widened).
struct PackedWeight {
  WeightType type;
  const void* panels;
  const float* bias;  // [n_panels * panel]
  int64_t depth;
  int64_t n_panels;
  const float* scales;  // [n_panels * panel], for kInt8: W[n, k] is scales[n] times the integer
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
  // Indexed by WeightType. A row's result does not depend on the tile it is computed in.
  void (*tile[kWeightTypes])(const LinearTile&);
};

}  // namespace revit::cpu
