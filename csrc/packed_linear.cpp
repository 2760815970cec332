// Linear layers on packed weights: checks, and the sharing of rows and columns among threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "weights.h"

namespace revit {
namespace {

// Rows of a task. All of them pass over a panel while it stays in the L1 cache.
constexpr int64_t kTaskRows = 72;
// Tasks per thread. More tasks balance better; fewer tasks read less data twice.
constexpr int64_t kTasksPerThread = 4;

Tensor packed_linear(const Tensor& x_in, const Tensor& panels, const Tensor& bias, int64_t n_out, int64_t activation) {
  STD_TORCH_CHECK(x_in.is_cpu() && x_in.dim() == 2 && x_in.scalar_type() == ScalarType::Float,
                  "x must be a float32 CPU tensor [T, K]");
  STD_TORCH_CHECK(n_out >= 1, "n_out must be positive, got ", n_out);
  const Tensor x = revit::contiguous(x_in);
  const int64_t n_rows = x.size(0), depth = x.size(1);
  const cpu::LinearKernels& kernels = cpu::kernels().linear;
  const cpu::PackedWeight weight = packed_weight(panels, bias, n_out, depth, "packed_linear");
  const cpu::Activation kind = activation_of(activation);
  const cpu::Finish finish = kind == cpu::Activation::kNone ? cpu::Finish::kStore : cpu::Finish::kActivate;
  Tensor out = torch::stable::new_empty(x, {n_rows, n_out});
  const float* x_data = static_cast<const float*>(x.const_data_ptr());
  float* out_data = static_cast<float*>(out.mutable_data_ptr());

  // The kernel writes whole panels and whole half blocks of rows; ragged rows and columns go through padded copies.
  const int64_t padded_out = weight.n_panels * kernels.panel;
  const int64_t direct = padded_out == n_out ? n_rows / kernels.half_block * kernels.half_block : 0;
  if (direct > 0) {
    share_linear({x_data, depth, direct, weight, 0, weight.n_panels, finish, kind, out_data, n_out});
  }
  if (const int64_t rest = n_rows - direct) {
    const int64_t padded_rows = divide_up(rest, kernels.half_block) * kernels.half_block;
    std::vector<float> rows(static_cast<size_t>(padded_rows * depth)),
        sums(static_cast<size_t>(padded_rows * padded_out));
    std::memcpy(rows.data(), x_data + direct * depth, rest * depth * sizeof(float));
    share_linear({rows.data(), depth, rest, weight, 0, weight.n_panels, finish, kind, sums.data(), padded_out});
    for (int64_t i = 0; i < rest; ++i) {
      std::memcpy(out_data + (direct + i) * n_out, sums.data() + i * padded_out, n_out * sizeof(float));
    }
  }
  return out;
}

int64_t cpu_panel() { return cpu::kernels().linear.panel; }

bool cpu_multiplies_bf16() { return cpu::kernels().linear.rounds; }

int64_t cpu_integer_depths() { return cpu::kernels().linear.integer_depths; }

}  // namespace

void share_linear(const cpu::LinearTile& whole) {
  const auto kernel = cpu::kernels().linear.tile[static_cast<int>(whole.weight.type)];
  const int64_t panel = cpu::kernels().linear.panel, n_panels = whole.end_panel - whole.first_panel;
  const int64_t row_tiles = divide_up(whole.n_rows, kTaskRows);
  const int64_t wanted = kTasksPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
  if (row_tiles == 0) return;
  const int64_t task_panels = std::max<int64_t>(1, n_panels / divide_up(wanted, row_tiles));
  const int64_t column_tiles = divide_up(n_panels, task_panels);
  for_each_task(row_tiles * column_tiles, [&](int64_t task) {
    const int64_t row = task / column_tiles * kTaskRows, column = task % column_tiles * task_panels;
    cpu::LinearTile tile = whole;
    tile.a += row * whole.a_stride;
    tile.n_rows = std::min(kTaskRows, whole.n_rows - row);
    tile.first_panel += column;
    tile.end_panel = std::min(tile.first_panel + task_panels, whole.end_panel);
    tile.out += row * whole.out_stride + column * panel;
    kernel(tile);
  });
}

}  // namespace revit

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CPU, m) { m.impl("packed_linear", TORCH_BOX(&revit::packed_linear)); }

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_panel", TORCH_BOX(&revit::cpu_panel));
  m.impl("cpu_multiplies_bf16", TORCH_BOX(&revit::cpu_multiplies_bf16));
  m.impl("cpu_integer_depths", TORCH_BOX(&revit::cpu_integer_depths));
}
