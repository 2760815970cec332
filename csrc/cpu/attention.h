// Attention over packed sequences: arguments and entry points.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace revit::cpu {

// A packed tensor [T, H, D], contiguous in its last dimension; strides in elements.
struct Heads {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct MutableHeads {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct AttentionArgs {
  Heads q, k, v;
  int64_t n_heads;   // query heads
  int64_t head_dim;  // at most 256
  int64_t group;     // query heads per key head
  double scale;
  bool causal;
  int64_t lse_head_stride;
};

struct AttentionForward : AttentionArgs {
  MutableHeads out;
  void* lse;  // [Hq, Tq] in the compute type; null if it is not wanted
};

struct AttentionBackward : AttentionArgs {
  Heads grad_out, out;
  const void* lse;
  const void* grad_lse;  // like lse; null for zero
  MutableHeads grad_q, grad_k, grad_v;
};

// Queries [first_row, first_row + n_rows) of one sequence, for one key head.
struct AttentionItem {
  int64_t q_begin, n_queries;
  int64_t k_begin, n_keys;
  int64_t kv_head;
  int64_t first_row, n_rows;
};

struct AttentionKernels {
  // A forward item may start at any multiple of this many rows: results do not depend on the cut.
  int64_t row_tile;
  // Indexed by DType. A backward item covers all rows of its sequence.
  void (*forward[kDTypes])(const AttentionForward&, const AttentionItem&);
  // Of float32 rows, rounded to bfloat16 for the products where the instruction set multiplies bfloat16.
  void (*forward_rounded)(const AttentionForward&, const AttentionItem&);
  void (*backward[kDTypes])(const AttentionBackward&, const AttentionItem&);
};

}  // namespace revit::cpu
