// Sharing attention among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention.h"

namespace revit {

// One item per sequence and key head, long sequences cut into parts of whole row tiles where that lets all threads work
// (`row_tile` 0: never), the most expensive sequences first.
std::vector<cpu::AttentionItem> plan_attention(const int32_t* q_offsets, const int32_t* k_offsets, int64_t batch,
                                               int64_t kv_heads, int64_t row_tile);

}  // namespace revit
