// Sharing attention among threads.
#include "attention_plan.h"

#include <algorithm>

#include "parallel.h"

namespace revit {

using cpu::AttentionItem;

namespace {

// Items per thread for which long sequences are cut. More items balance better, but each packs its keys again.
constexpr int64_t kItemsPerThread = 4;
// An item shorter than this many row tiles would spend its time packing keys.
constexpr int64_t kMinTilesPerItem = 4;

double cost_of(const AttentionItem& item) {
  return static_cast<double>(item.n_rows) * static_cast<double>(item.n_keys + 1);
}

}  // namespace

std::vector<AttentionItem> plan_attention(const int32_t* q_offsets, const int32_t* k_offsets, int64_t batch,
                                          int64_t kv_heads, int64_t row_tile) {
  std::vector<AttentionItem> whole;
  double total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    AttentionItem item = {};
    item.q_begin = q_offsets[b];
    item.n_queries = item.n_rows = q_offsets[b + 1] - q_offsets[b];
    item.k_begin = k_offsets[b];
    item.n_keys = k_offsets[b + 1] - k_offsets[b];
    if (item.n_rows == 0 && item.n_keys == 0) continue;
    whole.push_back(item);
    total += cost_of(item) * static_cast<double>(kv_heads);
  }
  std::stable_sort(whole.begin(), whole.end(),
                   [](const AttentionItem& a, const AttentionItem& b) { return cost_of(a) > cost_of(b); });

  const int64_t n_threads = torch::stable::get_num_threads();
  const double target = total / static_cast<double>(n_threads * kItemsPerThread);
  std::vector<AttentionItem> items;
  const auto add_head = [&](AttentionItem item, int64_t head) {
    const int64_t n_rows = item.n_rows;
    int64_t rows_per_item = n_rows;
    if (n_threads > 1 && row_tile > 0 && cost_of(item) > target) {
      const double rows = target / static_cast<double>(item.n_keys + 1);
      const int64_t tiles = std::max(kMinTilesPerItem, static_cast<int64_t>(rows) / row_tile);
      rows_per_item = std::min(rows_per_item, tiles * row_tile);
    }
    item.kv_head = head;
    do {
      item.n_rows = std::min(rows_per_item, n_rows - item.first_row);
      items.push_back(item);
      item.first_row += item.n_rows;
    } while (item.first_row < n_rows);
  };
  // Take as many sequences at a time as there are threads, and go through them head by head: each thread then tends to
  // stay with one sequence, whose next head the kernel prefetches.
  for (size_t begin = 0; begin < whole.size(); begin += n_threads) {
    const size_t end = std::min(whole.size(), begin + static_cast<size_t>(n_threads));
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (size_t s = begin; s < end; ++s) add_head(whole[s], head);
    }
  }
  return items;
}

}  // namespace revit
