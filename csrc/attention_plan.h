// Sharing attention among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention.h"

namespace revit {

// Returns one item per sequence and key head, the most expensive sequences first. Long sequences are cut into parts of
// whole row tiles if that gives work to all threads; with a `row_tile` of 0 they are never cut.
std::vector<cpu::AttentionItem> plan_attention(const int32_t* q_offsets, const int32_t* k_offsets, int64_t batch,
                                               int64_t kv_heads, int64_t row_tile);

}  // namespace revit
