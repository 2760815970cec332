// Work sharing over the threads of the caller's pool.
#pragma once

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace revit {

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Elements of one task of row arithmetic. Below this number a second thread costs more than it saves.
inline constexpr int64_t kTaskElements = 16384;

// The largest number of threads that is worth using for row arithmetic on `elements` elements.
inline int64_t max_threads_for(int64_t elements) { return elements < kTaskElements ? 1 : elements / kTaskElements; }

// Runs body(i) once for every i in [0, n_tasks), on at most `max_threads` threads of PyTorch's pool. Threads take the
// next task as they become free, so put long tasks first; which thread runs a task must not change its result.
template <class Body>
void for_each_task(int64_t n_tasks, const Body& body, int64_t max_threads = INT64_MAX) {
  int64_t n_threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (n_threads > max_threads) n_threads = max_threads;
  if (n_threads > n_tasks) n_threads = n_tasks;
  if (n_threads <= 1) {
    for (int64_t i = 0; i < n_tasks; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, n_threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < n_tasks; i = next.fetch_add(1)) body(i);
  });
}

}  // namespace revit
