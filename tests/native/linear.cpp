// Linear layers on packed weights against a plain double loop, on buffers that end with the last element that a kernel
// may touch.
//
// Inputs are whole numbers and weights multiples of 1/64, so that float holds every sum exactly: in whatever order they
// are added, sums must equal the truth, and a single wrong term shows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "layers.h"
#include "native_test.h"

namespace native {
namespace {

using revit::cpu::Finish;
using revit::cpu::kActivations;

struct Problem {
  Layer layer;
  int64_t n_columns;         // of whole panels
  std::vector<float> a;      // [kMostRows, depth]
  std::vector<double> sums;  // [kMostRows, n_columns], zero beyond n_out

  // Of layers and rows that int8 holds exactly too, if `whole`.
  Problem(int64_t n_out, int64_t depth, int64_t panel, bool whole, Random& random)
      : layer(whole ? whole_layer(n_out, depth, random) : exact_layer(n_out, depth, random)),
        n_columns(round_up(n_out, panel)),
        a(kMostRows * depth),
        sums(kMostRows * n_columns, 0.0) {
    for (float& value : a) value = whole ? whole_number(random, -127, 255) : whole_number(random, -4, 9);
    for (int64_t at = 0; whole && at < kMostRows * depth; ++at) {
      if (at % depth % kScaleUnit == 0) a[at] = at % 3 ? 127 : -127;
    }
    const std::vector<double> wide(a.begin(), a.end());
    for (int64_t i = 0; i < kMostRows; ++i) {
      for (int64_t n = 0; n < n_out; ++n) sums[i * n_columns + n] = layer(wide.data() + i * depth, n);
    }
  }
};

struct Case {
  int64_t n_rows, first_panel, end_panel, gap;  // gap: between the end of a row and the next
  Finish finish;
  Activation activation;
};

float held_before(int64_t at) { return static_cast<float>(at % 11 - 5); }

void check_tile(const revit::cpu::Kernels& kernels, const Problem& problem, const Packed& weight, WeightType type,
                const Case& c) {
  const int64_t panel = kernels.linear.panel, depth = problem.layer.depth;
  const int64_t rows = round_up(c.n_rows, kernels.linear.half_block), columns = (c.end_panel - c.first_panel) * panel;
  const int64_t a_stride = depth + c.gap, out_stride = columns + c.gap;
  std::vector<float> a((rows - 1) * a_stride + depth, kNan), out((rows - 1) * out_stride + columns);
  for (int64_t i = 0; i < c.n_rows; ++i) {
    std::copy_n(problem.a.data() + i * depth, depth, a.data() + i * a_stride);
  }
  for (size_t at = 0; at < out.size(); ++at) out[at] = held_before(static_cast<int64_t>(at));
  kernels.linear.tile[static_cast<int>(type)]({a.data(), a_stride, c.n_rows, weight.view(), c.first_panel, c.end_panel,
                                               c.finish, c.activation, out.data(), out_stride});

  const bool exact = c.finish != Finish::kActivate || c.activation == Activation::kNone;
  double worst = 0;  // relative to 1 + |x|; infinite where something is not a number or was not to be touched
  for (int64_t at = 0; at < static_cast<int64_t>(out.size()); ++at) {
    const int64_t i = at / out_stride, n = at % out_stride;
    double expected = held_before(at);
    if (n < columns) {
      if (i >= c.n_rows) continue;
      const double sum = problem.sums[i * problem.n_columns + c.first_panel * panel + n];
      expected = c.finish == Finish::kAdd ? expected + sum : sum;
      if (c.finish == Finish::kActivate) expected = activated(c.activation, sum);
    }
    const double error = std::fabs(out[at] - expected) / (1 + std::fabs(expected));
    worst = error <= worst ? worst : std::isnan(error) || n >= columns ? INFINITY : error;
  }
  const bool right = worst <= (exact ? 0 : 5e-7);
  CHECK(right);
  if (!right) {
    std::printf(
        "  linear tile, type %d, rows %d, depth %d, columns %d, panels [%d, %d), finish %d, activation %d: %g\n",
        static_cast<int>(type), static_cast<int>(c.n_rows), static_cast<int>(depth),
        static_cast<int>(problem.layer.n_out), static_cast<int>(c.first_panel), static_cast<int>(c.end_panel),
        static_cast<int>(c.finish), static_cast<int>(c.activation), worst);
  }
}

// Every way to finish a tile.
void check_tiles(const revit::cpu::Kernels& kernels, const Problem& problem, const Packed& weight, WeightType type,
                 int64_t n_rows) {
  std::vector<std::pair<int64_t, int64_t>> ranges = {{0, weight.n_panels()}};
  if (weight.n_panels() > 2) ranges.insert(ranges.end(), {{1, 2}, {1, weight.n_panels()}});
  for (const auto& [first, end] : ranges) {
    for (const int64_t gap : {0, 5}) {
      check_tile(kernels, problem, weight, type, {n_rows, first, end, gap, Finish::kStore, Activation::kNone});
      check_tile(kernels, problem, weight, type, {n_rows, first, end, gap, Finish::kAdd, Activation::kGelu});
    }
    for (int kind = 0; kind < kActivations; ++kind) {
      check_tile(kernels, problem, weight, type,
                 {n_rows, first, end, 0, Finish::kActivate, static_cast<Activation>(kind)});
    }
  }
}

}  // namespace

void test_linear(const revit::cpu::Kernels& kernels) {
  const int64_t panel = kernels.linear.panel;
  CHECK(panel >= 1 && kernels.linear.half_block >= 1);
  Random random(1);
  for (const int64_t depth : kDepths) {
    for (const int64_t n_out : {int64_t{1}, panel, 2 * panel + 3}) {
      const Problem exact(n_out, depth, panel, false, random), whole(n_out, depth, panel, true, random);
      for (const WeightType type : {WeightType::kFloat32, WeightType::kBFloat16, WeightType::kInt8}) {
        const Problem& problem = type == WeightType::kInt8 ? whole : exact;
        const Packed weight(problem.layer, type, kernels.linear);
        for (const int64_t n_rows : kRowCounts) {
          with_new_scratch([&] { check_tiles(kernels, problem, weight, type, n_rows); });
        }
      }
    }
  }
}

}  // namespace native
