// Resampling of one 8-bit image into normalised patch rows.
#pragma once

#include <cstdint>

namespace revit::cpu {

// Fraction bits of a weight (Pillow's PRECISION_BITS: 32 bits less 8 of the value, less 2 of headroom).
inline constexpr int kWeightBits = 22;
// A weight w is stored as high * 2^11 + low with 0 <= low < 2^11. |w| < 2^26 leaves both within int16.
inline constexpr int kLowBits = 11;

// The weights of taps 2p and 2p + 1 of an output, each split in two; a tap beyond the last has weight 0.
struct TapPair {
  int16_t high[2];
  int16_t low[2];
};

// One axis: out[i] = clip8((2^21 + sum_t weight(i, t) * in[first[i] + t]) >> 22) over t < n_taps[i].
struct ResizeAxis {
  const int32_t* first;   // [n_out], never decreasing; even on the horizontal axis
  const int32_t* n_taps;  // [n_out], at least 1
  const TapPair* pairs;   // [n_out, pairs_stride]
  int64_t pairs_stride;
  int32_t max_taps;
  bool identity;  // every output is one input with weight 1
};

struct ResizeArgs {
  const uint8_t* image;  // channel c of pixel (y, x) is at y * stride_y + x * stride_x + c * stride_c
  int64_t stride_y;
  int64_t stride_x;
  int64_t stride_c;
  int32_t height;
  int32_t width;
  int32_t out_width;  // pixels, a multiple of patch_size
  int32_t patch_size;
  ResizeAxis horizontal;
  ResizeAxis vertical;
  bool vertical_first;
  const void* table;      // [3, 256] output elements per channel and 8-bit value; none for 8-bit output
  int32_t element_bytes;  // 1, 2 or 4
  void* out;              // patch rows [gh * gw, P, P, 3] of this image
};

struct ResizeKernels {
  // Bytes of scratch memory, aligned to 64, that `rows` needs.
  int64_t (*scratch_bytes)(const ResizeArgs&);
  // Computes output pixel rows [begin, end). The result does not depend on how the rows are divided into calls.
  void (*rows)(const ResizeArgs&, int32_t begin, int32_t end, uint8_t* scratch);
};

}  // namespace revit::cpu
