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

// Cosines and sines by which heads turn, [R][n_tables][2][head_dim / 2], for the R rows of a table of positions.
// Channels i and i + head_dim / 2 are a pair. Null `table`: no rotation.
struct Rotary {
  const float* table;
  int64_t n_tables;  // one for every head, or 1 for all heads
};

// A block's sizes and weights.
struct BlockWeights {
  int64_t n_channels;  // C
  int64_t n_heads, head_dim;
  int64_t hidden;
  Activation activation;
  bool gated_mlp;        // fc1 has two parts: the activation of the first multiplies the second
  bool gated_attention;  // a sigmoid multiplies what the heads have read
  double scale;          // factor on the scores
  TokenNorm norm1;
  PackedWeight qkv;          // queries, gates if there are any, keys, values; each begins at a panel of its own
  TokenNorm q_norm, k_norm;  // [head_dim], the same for all lengths
  Rotary rotary;
  TokenNorm out_norm;
  PackedWeight proj;
  TokenNorm norm2;
  PackedWeight fc1;  // each part begins at a panel of its own
  TokenNorm mlp_norm;
  PackedWeight fc2;

  int64_t width() const { return n_heads * head_dim; }
  // Parts of `qkv` before the keys.
  int64_t parts_before_keys() const { return gated_attention ? 2 : 1; }
  bool finishes_heads() const { return q_norm.weight != nullptr || rotary.table != nullptr; }
  bool finishes_attended() const { return out_norm.weight != nullptr || gated_attention; }
};

// y = norm(x) for rows [0, n_rows); `length` [n_rows] is the index of each row's length.
struct NormTile {
  Rows x, y;
  const int32_t* length;
  int64_t n_rows;
  TokenNorm norm;
  int64_t n_channels;
};

// The second part of `block` and the first part of `next`, for rows [0, n_rows):
//
//   attended = out_norm(attended) * sigmoid(gates)
//   x += attended Wp' + bp
//   x += mlp_norm(act(norm2(x) W1' + b1)) W2' + b2,  gated: act(norm2(x) W1' + b1) * (norm2(x) W3' + b3)
//   projected = norm1(x) Wq' + bq, the columns of panels [first_panel, end_panel)
//   the queries and keys among them = turned(norm(head)), head by head
//
// The first part is left out if `attended` has no data, the second if `projected` has none. The hidden activations,
// n_rows x hidden, stay in the L2 cache. The two blocks may differ in everything but C.
//
// n_rows is positive. As in linear.h, all arrays have whole half blocks of rows. The rows of `x` and `projected` hold
// whole panels of columns, all of which are written.
struct BlockTile {
  const BlockWeights* block;
  Rows attended;
  Rows gates;  // only read if the block has gates
  Rows x;
  const int32_t* length;
  const int32_t* position;  // row of the rotary table, negative for a row that does not turn; null: no row turns
  int64_t n_rows;
  const BlockWeights* next;
  int64_t first_panel, end_panel;
  Rows projected;

  // `n` rows from `row` on.
  BlockTile part(int64_t row, int64_t n) const {
    BlockTile tile = *this;
    Rows* const all[] = {&tile.attended, &tile.gates, &tile.x, &tile.projected};
    for (Rows* rows : all) {
      if (rows->data != nullptr) *rows = rows->from(row);
    }
    tile.length += row;
    if (position != nullptr) tile.position += row;
    tile.n_rows = n;
    return tile;
  }
};

// Patch rows [0, n_rows) to tokens: tokens[i] = norm(rows[i] W' + b) + positions[i]. A tile may have patches of several
// images: `token` says where each row goes; `length` and `position` are those of all tokens, and `position` says which
// row of the table is added.
struct EmbedTile {
  const void* rows;  // [n_rows, depth]
  DType dtype;
  bool bytes;  // uint8 instead of `dtype`
  int64_t n_rows;
  PackedWeight embed;
  TokenNorm norm;
  int64_t n_channels;
  const float* table;
  const int32_t *length, *position;
  const int64_t* token;
  Rows tokens;
};

struct BlockKernels {
  // Most rows of a tile that fits into the L2 cache, indexed by WeightType.
  int64_t (*max_rows[kWeightTypes])(const BlockWeights&);
  int64_t (*max_embed_rows)(int64_t depth);
  // Indexed by WeightType; there is no embedding for kInt8.
  void (*tile[kWeightTypes])(const BlockTile&);
  void (*embed[2])(const EmbedTile&);
  void (*norm)(const NormTile&);
  // Parts of a tile: what is done to `attended`, and to the heads in `projected`.
  void (*finish_attended)(const BlockTile&);
  void (*finish_heads)(const BlockTile&);
};

}  // namespace revit::cpu
