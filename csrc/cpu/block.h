// A transformer block on a tile of rows: arguments and entry points.
#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "cpu/types.h"

namespace revit::cpu {

// Rows [n_rows, C] of float32, `stride` elements apart.
struct Rows {
  float* data;
  int64_t stride;

  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// LayerNorm with affine parameters [n_lengths, C]; a row uses those of its length. Null `weight`: no norm; null `bias`:
// RMSNorm.
struct TokenNorm {
  const float* weight;
  const float* bias;
  double eps;  // added to the variance, or to the mean square
};

// Values that all tiles of a block share.
struct BlockShape {
  int64_t n_channels;  // C
  int64_t width;       // heads * head_dim
  int64_t hidden;
  Activation activation;
};

// y = norm(x) for rows [0, n_rows); `length` [n_rows] is the index of each row's length.
struct NormTile {
  Rows x, y;
  const int32_t* length;
  int64_t n_rows;
  TokenNorm norm;
  int64_t n_channels;
};

// The second part of a block and the first part of the next, for rows [0, n_rows):
//
//   x += attended Wp' + bp
//   x += act(norm2(x) W1' + b1) W2' + b2
//   projected = next_norm(x) Wq' + bq, the columns of panels [first_panel, end_panel)
//
// The first part is left out if `attended` has no data, the second if `projected` has none. The hidden activations,
// n_rows x hidden, stay in the L2 cache. The next block may have another width and hidden size than `shape`.
//
// n_rows is positive. As in linear.h, all arrays have whole half blocks of rows. The rows of `x` and `projected` hold
// whole panels of columns, all of which are written.
struct BlockTile {
  const BlockShape* shape;
  Rows attended;
  Rows x;
  const int32_t* length;
  int64_t n_rows;
  PackedWeight proj;
  TokenNorm norm2;
  PackedWeight fc1, fc2;
  TokenNorm next_norm;
  PackedWeight next;
  int64_t first_panel, end_panel;
  Rows projected;
};

// Patch rows [0, n_rows) to tokens: tokens[i] = rows[i] W' + b + positions[i]. A tile may have patches of several
// images: `token` and `position` say where each row goes and which row of the table is added to it.
struct EmbedTile {
  const void* rows;  // [n_rows, depth]
  DType dtype;
  bool bytes;  // uint8 instead of `dtype`
  int64_t n_rows;
  PackedWeight embed;
  int64_t n_channels;
  const float* table;
  const int64_t* position;
  const int64_t* token;
  Rows tokens;
};

struct BlockKernels {
  // Most rows of a tile that fits into the L2 cache, indexed by WeightType.
  int64_t (*max_rows[kWeightTypes])(const BlockShape&);
  int64_t (*max_embed_rows)(int64_t depth);
  // Indexed by WeightType; there is no embedding for kInt8.
  void (*tile[kWeightTypes])(const BlockTile&);
  void (*embed[2])(const EmbedTile&);
  void (*norm)(const NormTile&);
};

}  // namespace revit::cpu
