// Tiles of a transformer block against a plain double loop and against the same layers one after another, on buffers
// that end with the last element that a kernel may touch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "layers.h"
#include "native_test.h"

namespace native {
namespace {

using revit::cpu::BlockTile;
using revit::cpu::BlockWeights;
using revit::cpu::DType;
using revit::cpu::Finish;
using revit::cpu::Rows;
using revit::cpu::TokenNorm;

constexpr int32_t kLengths = 3;
constexpr double kTolerance = 2e-5;
// What rounding to int8 and to bfloat16 does to numbers of order one; that a tile does the same as its layers is
// checked bit by bit.
constexpr double kInt8Tolerance = 0.2, kBFloat16Tolerance = 0.05;

double tolerance_of(const revit::cpu::Kernels& kernels, WeightType type) {
  if (type == WeightType::kInt8) return kInt8Tolerance;
  return type == WeightType::kBFloat16 && kernels.linear.rounds ? kBFloat16Tolerance : kTolerance;
}

int32_t length_of(int64_t row) { return static_cast<int32_t>((2 * row + 1) % kLengths); }

std::vector<int32_t> lengths_of(int64_t n_rows) {
  std::vector<int32_t> lengths(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) lengths[i] = length_of(i);
  return lengths;
}

// Rows of which the last ends the buffer; NaN until they are written.
struct Matrix {
  int64_t n_rows, n_columns, stride;
  std::vector<float> data;

  Matrix(int64_t n_rows, int64_t n_columns, int64_t gap)
      : n_rows(n_rows), n_columns(n_columns), stride(n_columns + gap), data((n_rows - 1) * stride + n_columns, kNan) {}

  Rows view() { return {data.data(), stride}; }

  // The first rows and columns become those of `values`, of `n` columns.
  void fill(const std::vector<float>& values, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(values.data() + i * n, n, data.data() + i * stride);
  }

  // Largest difference to rows of n columns, relative to 1 + |x|; infinity where a value is NaN.
  double difference(const std::vector<double>& truth, int64_t rows, int64_t n) const {
    double worst = 0;
    for (int64_t at = 0; at < rows * n; ++at) {
      const double error = std::fabs(data[at / n * stride + at % n] - truth[at]) / (1 + std::fabs(truth[at]));
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
    return worst;
  }

  bool same_bits(const Matrix& other, int64_t rows, int64_t n) const {
    bool same = true;
    for (int64_t i = 0; i < rows; ++i) {
      same = same && std::memcmp(data.data() + i * stride, other.data.data() + i * other.stride, n * 4) == 0;
    }
    return same;
  }

  bool gaps_untouched() const {
    bool untouched = true;
    for (size_t at = 0; at < data.size(); ++at) {
      untouched = untouched && (static_cast<int64_t>(at) % stride < n_columns || std::isnan(data[at]));
    }
    return untouched;
  }
};

struct Norm {
  int64_t n_channels;
  double eps;
  std::vector<float> weight, bias;  // [kLengths, n_channels]

  Norm(int64_t n_channels, double eps, Random& random)
      : n_channels(n_channels), eps(eps), weight(kLengths * n_channels), bias(kLengths * n_channels) {
    for (float& w : weight) w = 1 + uniform(random) / 2;
    for (float& b : bias) b = uniform(random);
  }

  TokenNorm view() const { return {weight.data(), bias.data(), eps}; }

  void operator()(const double* x, int32_t length, double* y) const {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < n_channels; ++c) mean += x[c] / static_cast<double>(n_channels);
    for (int64_t c = 0; c < n_channels; ++c) {
      variance += (x[c] - mean) * (x[c] - mean) / static_cast<double>(n_channels);
    }
    const double scale = 1 / std::sqrt(variance + eps);
    for (int64_t c = 0; c < n_channels; ++c) {
      y[c] = (x[c] - mean) * scale * weight[length * n_channels + c] + bias[length * n_channels + c];
    }
  }
};

std::vector<float> random_values(int64_t n, Random& random) {
  std::vector<float> values(n);
  for (float& value : values) value = 2 * uniform(random);
  return values;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Shape {
  int64_t n_channels, width, hidden;
  Activation activation;
  bool gated = false;  // attention and the MLP
  bool norms = false;  // of what the heads have read, and of the hidden columns
};

// A block's weights, its input, and what it makes of it in double.
struct Problem {
  Shape shape;
  Layer proj, fc1, up, fc2, next;
  Norm out_norm, norm2, mlp_norm, next_norm;
  std::vector<float> x, attended, gates;  // kMostRows
  std::vector<double> block;              // x after the second part of the block
  // Projections of x as it came and of x after the block, [kMostRows, next.n_out].
  std::vector<double> projected, block_projected;

  Problem(const Shape& s, int64_t n_next, Random& random)
      : shape(s),
        proj(random_layer(s.n_channels, s.width, random)),
        fc1(random_layer(s.hidden, s.n_channels, random)),
        up(random_layer(s.hidden, s.n_channels, random)),
        fc2(random_layer(s.n_channels, s.hidden, random)),
        next(random_layer(n_next, s.n_channels, random)),
        out_norm(s.width, 0.1, random),
        norm2(s.n_channels, 1e-6, random),
        mlp_norm(s.hidden, 0.1, random),
        next_norm(s.n_channels, 0.1, random),
        x(random_values(kMostRows * s.n_channels, random)),
        attended(random_values(kMostRows * s.width, random)),
        gates(random_values(kMostRows * s.width, random)),
        block(x.begin(), x.end()),
        projected(kMostRows * n_next),
        block_projected(kMostRows * n_next) {
    std::vector<double> wide(attended.begin(), attended.end());
    std::vector<double> normed(s.n_channels), hidden(s.hidden);
    for (int64_t i = 0; i < kMostRows; ++i) {
      double *row = block.data() + i * s.n_channels, *read = wide.data() + i * s.width;
      project(row, i, normed.data(), projected.data());
      if (s.norms) out_norm(read, length_of(i), read);
      for (int64_t c = 0; s.gated && c < s.width; ++c) read[c] *= sigmoid(gates[i * s.width + c]);
      for (int64_t n = 0; n < s.n_channels; ++n) row[n] += proj(read, n);
      norm2(row, length_of(i), normed.data());
      for (int64_t n = 0; n < s.hidden; ++n) {
        hidden[n] = activated(s.activation, fc1(normed.data(), n)) * (s.gated ? up(normed.data(), n) : 1);
      }
      if (s.norms) mlp_norm(hidden.data(), length_of(i), hidden.data());
      for (int64_t n = 0; n < s.n_channels; ++n) row[n] += fc2(hidden.data(), n);
      project(row, i, normed.data(), block_projected.data());
    }
  }

  void project(const double* row, int64_t i, double* normed, double* out) const {
    next_norm(row, length_of(i), normed);
    for (int64_t n = 0; n < next.n_out; ++n) out[i * next.n_out + n] = next(normed, n);
  }
};

// Two layers of equal size as one; each begins at a panel of its own.
Layer joined(const Layer& first, const Layer& second, int64_t panel) {
  const int64_t n_out = round_up(first.n_out, panel), depth = first.depth;
  Layer both = {2 * n_out, depth, std::vector<float>(2 * n_out * depth), std::vector<float>(2 * n_out)};
  for (const auto& [layer, begin] : {std::pair(&first, int64_t{0}), std::pair(&second, n_out)}) {
    std::copy(layer->weight.begin(), layer->weight.end(), both.weight.begin() + begin * depth);
    std::copy(layer->bias.begin(), layer->bias.end(), both.bias.begin() + begin);
  }
  return both;
}

// The same weights as the kernels read them.
struct PackedBlock {
  WeightType type;
  Packed proj, fc1, fc2, next;

  PackedBlock(const Problem& problem, WeightType type, const revit::cpu::LinearKernels& kernels)
      : type(type),
        proj(problem.proj, type, kernels),
        fc1(problem.shape.gated ? joined(problem.fc1, problem.up, kernels.panel) : problem.fc1, type, kernels),
        fc2(problem.fc2, type, kernels),
        next(problem.next, type, kernels) {}

  BlockWeights of(const Problem& problem) const {
    const Shape& shape = problem.shape;
    BlockWeights block = {};
    block.n_channels = shape.n_channels;
    block.n_heads = 1;
    block.head_dim = shape.width;
    block.hidden = shape.hidden;
    block.activation = shape.activation;
    block.gated_mlp = block.gated_attention = shape.gated;
    block.norm1 = problem.next_norm.view();
    block.qkv = next.view();
    block.proj = proj.view();
    block.norm2 = problem.norm2.view();
    block.fc1 = fc1.view();
    block.fc2 = fc2.view();
    if (shape.norms) {
      block.out_norm = problem.out_norm.view();
      block.mlp_norm = problem.mlp_norm.view();
    }
    return block;
  }
};

struct Case {
  int64_t n_rows, gap;
  bool attended, projected;
  int64_t first_panel, end_panel;
};

// What block.h says a tile does, one layer after another.
void by_layers(const revit::cpu::Kernels& kernels, const BlockTile& tile, WeightType type) {
  const BlockWeights& block = *tile.block;
  const int64_t rows = round_up(tile.n_rows, kernels.linear.half_block), panel = kernels.linear.panel;
  Matrix normed(rows, block.n_channels, 0), hidden(rows, round_up(block.hidden, panel), 0);
  const auto kernel = kernels.linear.tile[static_cast<int>(type)];
  const auto norm_of = [&](const Rows& in, const Rows& out, const TokenNorm& norm, int64_t n) {
    kernels.block.norm({in, out, tile.length, tile.n_rows, norm, n});
  };
  const auto layer = [&](const Rows& in, const revit::cpu::PackedWeight& weight, int64_t first, int64_t end,
                         Finish finish, const Rows& out) {
    kernel({in.data, in.stride, tile.n_rows, weight, first, end, finish, block.activation, out.data, out.stride});
  };
  if (tile.attended.data != nullptr) {
    if (block.finishes_attended()) kernels.block.finish_attended(tile);
    layer(tile.attended, block.proj, 0, block.proj.n_panels, Finish::kAdd, tile.x);
    norm_of(tile.x, normed.view(), block.norm2, block.n_channels);
    const int64_t half = round_up(block.hidden, panel) / panel;
    layer(normed.view(), block.fc1, 0, half, Finish::kActivate, hidden.view());
    if (block.gated_mlp) layer(normed.view(), block.fc1, half, 2 * half, Finish::kMultiply, hidden.view());
    if (block.mlp_norm.weight != nullptr) norm_of(hidden.view(), hidden.view(), block.mlp_norm, block.hidden);
    layer(hidden.view(), block.fc2, 0, block.fc2.n_panels, Finish::kAdd, tile.x);
  }
  if (tile.projected.data != nullptr) {
    norm_of(tile.x, normed.view(), tile.next->norm1, block.n_channels);
    layer(normed.view(), tile.next->qkv, tile.first_panel, tile.end_panel, Finish::kStore, tile.projected);
  }
}

void check_tile(const revit::cpu::Kernels& kernels, const Problem& problem, const PackedBlock& weights, const Case& c) {
  const Shape& shape = problem.shape;
  const int64_t panel = kernels.linear.panel, rows = round_up(c.n_rows, kernels.linear.half_block);
  const int64_t n_channels = shape.n_channels, columns = (c.end_panel - c.first_panel) * panel;
  const std::vector<int32_t> lengths = lengths_of(c.n_rows);
  const BlockWeights block = weights.of(problem);
  Matrix attended(rows, shape.width, c.gap), gates(rows, shape.width, 0), x(rows, round_up(n_channels, panel), c.gap);
  Matrix projected(rows, columns, c.gap);
  attended.fill(problem.attended, c.n_rows, shape.width);
  gates.fill(problem.gates, c.n_rows, shape.width);
  x.fill(problem.x, c.n_rows, n_channels);
  BlockTile tile = {};
  tile.block = &block;
  tile.x = x.view();
  tile.length = lengths.data();
  tile.n_rows = c.n_rows;
  tile.next = &block;
  if (c.attended) {
    tile.attended = attended.view();
    tile.gates = gates.view();
  }
  if (c.projected) {
    tile.first_panel = c.first_panel;
    tile.end_panel = c.end_panel;
    tile.projected = projected.view();
  }
  kernels.block.tile[static_cast<int>(weights.type)](tile);

  const int64_t n_next = problem.next.n_out, first = c.first_panel * panel;
  const int64_t n_projected = std::min(columns, n_next - first);
  std::vector<double> expected(c.n_rows * n_projected);
  for (int64_t i = 0; i < c.n_rows; ++i) {
    const std::vector<double>& all = c.attended ? problem.block_projected : problem.projected;
    std::copy_n(all.data() + i * n_next + first, n_projected, expected.data() + i * n_projected);
  }
  const double x_error = c.attended ? x.difference(problem.block, c.n_rows, n_channels)
                                    : x.difference({problem.x.begin(), problem.x.end()}, c.n_rows, n_channels);
  const double tolerance = tolerance_of(kernels, weights.type);
  const double projected_error = c.projected ? projected.difference(expected, c.n_rows, n_projected) : 0;
  CHECK(x_error <= (c.attended ? tolerance : 0));
  CHECK(projected_error <= tolerance);
  CHECK(x.gaps_untouched() && attended.gaps_untouched() && projected.gaps_untouched());
  if (!c.projected) CHECK(std::all_of(projected.data.begin(), projected.data.end(), [](float v) { return v != v; }));

  Matrix layers_x(rows, x.n_columns, 0), layers_projected(rows, columns, 0);
  layers_x.fill(problem.x, c.n_rows, n_channels);
  attended.fill(problem.attended, c.n_rows, shape.width);
  tile.x = layers_x.view();
  if (c.projected) tile.projected = layers_projected.view();
  by_layers(kernels, tile, weights.type);
  const bool same = x.same_bits(layers_x, c.n_rows, n_channels) &&
                    (!c.projected || projected.same_bits(layers_projected, c.n_rows, columns));
  CHECK(same);
  if (!same || !(x_error <= tolerance && projected_error <= tolerance)) {
    std::printf("  block tile, type %d, rows %d, C %d, width %d, hidden %d, gated %d, norms %d, attended %d, ",
                static_cast<int>(weights.type), static_cast<int>(c.n_rows), static_cast<int>(n_channels),
                static_cast<int>(shape.width), static_cast<int>(shape.hidden), shape.gated, shape.norms, c.attended);
    std::printf("panels [%d, %d): x %g, %g\n", static_cast<int>(c.first_panel), static_cast<int>(c.end_panel), x_error,
                projected_error);
  }
}

void test_tiles(const revit::cpu::Kernels& kernels, const Shape& shape, Random& random) {
  const int64_t panel = kernels.linear.panel;
  const Problem problem(shape, 2 * panel + 3, random);
  for (const WeightType type : {WeightType::kFloat32, WeightType::kBFloat16, WeightType::kInt8}) {
    const PackedBlock weights(problem, type, kernels.linear);
    for (const int64_t n_rows : kRowCounts) {
      const int64_t gap = n_rows % 2 * 5;
      for (const Case& c : {Case{n_rows, gap, true, true, 0, 3},
                            {n_rows, 0, true, false, 0, 1},
                            {n_rows, gap, false, true, 1, 3},
                            {n_rows, 0, false, true, 1, 2}}) {
        with_new_scratch([&] { check_tile(kernels, problem, weights, c); });
      }
    }
    check_tile(kernels, problem, weights, {3, 5, false, false, 0, 1});
  }
}

void test_max_rows(const revit::cpu::Kernels& kernels) {
  const int64_t unit = 2 * kernels.linear.half_block;
  for (const int64_t n_channels : {1, 7, 192, 384, 768, 16384}) {
    const int64_t embed = kernels.block.max_embed_rows(n_channels);
    CHECK(embed > 0 && embed % unit == 0);
    for (const int64_t hidden : {int64_t{1}, int64_t{300}, 4 * n_channels}) {
      for (const auto max_rows : kernels.block.max_rows) {
        BlockWeights block = {};
        block.n_channels = block.head_dim = n_channels;
        block.n_heads = 1;
        block.hidden = hidden;
        const float weight = 1;
        for (const float* norm : {static_cast<const float*>(nullptr), &weight}) {
          block.mlp_norm.weight = norm;
          const int64_t rows = max_rows(block);
          CHECK(rows > 0 && rows % unit == 0);
        }
      }
    }
  }
}

void test_norm(const revit::cpu::Kernels& kernels, int64_t n_rows, int64_t n_channels, Random& random) {
  const Norm norm(n_channels, 1e-6, random);
  const std::vector<float> values = random_values(n_rows * n_channels, random);
  const std::vector<double> wide(values.begin(), values.end());
  const std::vector<int32_t> lengths = lengths_of(n_rows);
  std::vector<double> expected(wide.size());
  for (int64_t i = 0; i < n_rows; ++i) {
    norm(wide.data() + i * n_channels, length_of(i), expected.data() + i * n_channels);
  }
  Matrix x(n_rows, n_channels, 5), y(n_rows, n_channels, 2);
  x.fill(values, n_rows, n_channels);
  for (const Rows& out : {y.view(), x.view()}) {  // elsewhere, then in place
    kernels.block.norm({x.view(), out, lengths.data(), n_rows, norm.view(), n_channels});
  }
  CHECK(y.difference(expected, n_rows, n_channels) <= kTolerance);
  CHECK(x.same_bits(y, n_rows, n_channels));
  CHECK(x.gaps_untouched() && y.gaps_untouched());
}

// Queries and keys [n_heads, head_dim] of a row each; the angles of a row are of all heads, or of each.
struct HeadsCase {
  int64_t n_heads, head_dim;
  bool gated, norms, turns, tables_of_heads;
};

void test_heads(const revit::cpu::Kernels& kernels, const HeadsCase& c, Random& random) {
  const int64_t panel = kernels.linear.panel, width = c.n_heads * c.head_dim, n_rows = 9, half = c.head_dim / 2;
  const int64_t part = round_up(width, panel), parts = c.gated ? 4 : 3, n_columns = parts * part, n_positions = 5;
  const int64_t n_tables = c.tables_of_heads ? c.n_heads : 1, before_keys = parts - 2;
  const Norm q_norm(c.head_dim, 0.1, random), k_norm(c.head_dim, 1e-3, random);
  std::vector<float> table(n_positions * n_tables * c.head_dim), values = random_values(n_rows * n_columns, random);
  for (int64_t at = 0; at < n_positions * n_tables; ++at) {
    for (int64_t j = 0; j < half; ++j) {
      const double angle = 3 * uniform(random);
      table[at * c.head_dim + j] = static_cast<float>(std::cos(angle));
      table[at * c.head_dim + half + j] = static_cast<float>(std::sin(angle));
    }
  }
  std::vector<int32_t> position(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) position[i] = i % 4 == 1 ? -1 : static_cast<int32_t>(i % n_positions);
  BlockWeights block = {};
  block.n_heads = c.n_heads;
  block.head_dim = c.head_dim;
  block.gated_attention = c.gated;
  if (c.norms) {
    block.q_norm = q_norm.view();
    block.k_norm = k_norm.view();
  }
  if (c.turns) block.rotary = {table.data(), n_tables};

  // All parts; keys and values; queries and gates, which have no position.
  for (const auto& [first, end, positioned] :
       {std::tuple(int64_t{0}, parts, true), {before_keys, parts, true}, {0, before_keys, false}}) {
    std::vector<double> expected(values.begin(), values.end());
    for (int64_t i = 0; i < n_rows; ++i) {
      for (const int64_t column : {int64_t{0}, before_keys}) {
        if (column < first || column >= end) continue;
        for (int64_t h = 0; h < c.n_heads; ++h) {
          double* head = expected.data() + i * n_columns + column * part + h * c.head_dim;
          if (c.norms) (column == 0 ? q_norm : k_norm)(head, 0, head);
          if (!c.turns || !positioned || position[i] < 0) continue;
          const int64_t row = position[i] * n_tables + (c.tables_of_heads ? h : 0);
          for (int64_t j = 0; j < half; ++j) {
            const double cosine = table[row * c.head_dim + j], sine = table[row * c.head_dim + half + j];
            const double a = head[j], b = head[j + half];
            head[j] = a * cosine - b * sine;
            head[j + half] = b * cosine + a * sine;
          }
        }
      }
    }
    Matrix projected(n_rows, n_columns, 3);
    projected.fill(values, n_rows, n_columns);
    BlockTile tile = {};
    tile.next = &block;
    tile.n_rows = n_rows;
    if (positioned) tile.position = position.data();
    tile.first_panel = first * part / panel;
    tile.end_panel = end * part / panel;
    tile.projected = projected.view();
    tile.projected.data += first * part;
    kernels.block.finish_heads(tile);
    const double error = projected.difference(expected, n_rows, n_columns);
    CHECK(error <= kTolerance);
    CHECK(projected.gaps_untouched());
    bool others = true;  // gates, values and what pads a part are left alone
    for (int64_t at = 0; at < n_rows * n_columns; ++at) {
      const int64_t n = at % n_columns, column = n / part;
      const bool turned = (column == 0 || column == before_keys) && n % part < width;
      others = others && (turned || projected.data[at / n_columns * projected.stride + n] == values[at]);
    }
    CHECK(others);
    if (error > kTolerance || !others) {
      std::printf("  heads %d of %d, gated %d, norms %d, turns %d, tables %d, parts [%d, %d): %g\n",
                  static_cast<int>(c.n_heads), static_cast<int>(c.head_dim), c.gated, c.norms, c.turns,
                  static_cast<int>(n_tables), static_cast<int>(first), static_cast<int>(end), error);
    }
  }
}

uint16_t half_bits(float value) {
  if (value == 0) return 0;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)));
}

// Patch rows of whole numbers, a table of whole numbers and weights in multiples of 1/64: every sum is exact.
struct EmbedProblem {
  static constexpr int64_t kTableRows = 17;
  Layer layer;
  std::vector<float> rows, table;  // [kMostRows, depth], [kTableRows, n_out]
  std::vector<double> sums;        // [kMostRows, n_out]
  std::vector<int32_t> position;   // of the patches

  EmbedProblem(int64_t n_channels, int64_t depth, bool bytes, Random& random)
      : layer(exact_layer(n_channels, depth, random)),
        rows(kMostRows * depth),
        table(kTableRows * n_channels),
        sums(kMostRows * n_channels),
        position(kMostRows) {
    for (float& value : rows) value = whole_number(random, bytes ? 0 : -128, 256);
    for (float& value : table) value = whole_number(random, -8, 17);
    for (int32_t& row : position) row = static_cast<int32_t>(random() % kTableRows);
    const std::vector<double> wide(rows.begin(), rows.end());
    for (int64_t at = 0; at < kMostRows * n_channels; ++at) {
      const int64_t i = at / n_channels, n = at % n_channels;
      sums[at] = layer(wide.data() + i * depth, n) + table[position[i] * n_channels + n];
    }
  }
};

template <class T>
void check_embed(const revit::cpu::Kernels& kernels, const EmbedProblem& problem, const Packed& weight, WeightType type,
                 DType dtype, int64_t n_rows, T (*encode)(float)) {
  const int64_t depth = problem.layer.depth, n_channels = problem.layer.n_out, n_tokens = n_rows + 3;
  std::vector<T> rows(n_rows * depth);
  for (int64_t at = 0; at < n_rows * depth; ++at) rows[at] = encode(problem.rows[at]);
  std::vector<int64_t> places(n_tokens);
  std::iota(places.begin(), places.end(), 0);
  Random random(static_cast<uint32_t>(n_rows));
  std::shuffle(places.begin(), places.end(), random);
  const std::vector<int64_t> token(places.begin(), places.begin() + n_rows);
  std::vector<int32_t> position(n_tokens, -1);
  for (int64_t i = 0; i < n_rows; ++i) position[token[i]] = problem.position[i];
  Matrix tokens(n_tokens, n_channels, n_rows % 2 * 5), expected(n_tokens, n_channels, 0);
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t n = 0; n < n_channels; ++n) {
      expected.data[token[i] * n_channels + n] = static_cast<float>(problem.sums[i * n_channels + n]);
    }
  }
  kernels.block.embed[static_cast<int>(type)]({rows.data(),
                                               dtype,
                                               sizeof(T) == 1,
                                               n_rows,
                                               weight.view(),
                                               {},
                                               n_channels,
                                               problem.table.data(),
                                               nullptr,
                                               position.data(),
                                               token.data(),
                                               tokens.view()});
  bool right = tokens.gaps_untouched();
  for (int64_t at = 0; at < n_tokens * n_channels; ++at) {
    const float ours = tokens.data[at / n_channels * tokens.stride + at % n_channels], truth = expected.data[at];
    right = right && (std::isnan(truth) ? std::isnan(ours) : ours == truth);
  }
  CHECK(right);
  if (!right) {
    std::printf("  embed, weight type %d, row dtype %d of %d bytes, rows %d, depth %d, C %d\n", static_cast<int>(type),
                static_cast<int>(dtype), static_cast<int>(sizeof(T)), static_cast<int>(n_rows), static_cast<int>(depth),
                static_cast<int>(n_channels));
  }
}

void test_embed(const revit::cpu::Kernels& kernels, int64_t n_channels, int64_t depth, Random& random) {
  const EmbedProblem floats(n_channels, depth, false, random), bytes(n_channels, depth, true, random);
  for (const WeightType type : {WeightType::kFloat32, WeightType::kBFloat16}) {
    const Packed weight(floats.layer, type, kernels.linear);
    const Packed weight_of_bytes(bytes.layer, type, kernels.linear);
    for (const int64_t n_rows : kRowCounts) {
      with_new_scratch([&] {
        const auto check = [&](DType of_rows, auto encode) {
          check_embed(kernels, floats, weight, type, of_rows, n_rows, +encode);
        };
        check(DType::kFloat32, [](float value) { return value; });
        check(DType::kBFloat16, [](float value) { return bfloat16_bits(value); });
        check(DType::kFloat16, [](float value) { return half_bits(value); });
        // What float cannot hold is rounded away.
        check(DType::kFloat64, [](float value) { return value * (1 + 1e-12); });
        check_embed(
            kernels, bytes, weight_of_bytes, type, DType::kFloat32, n_rows,
            +[](float value) { return static_cast<uint8_t>(value); });
      });
    }
  }
}

}  // namespace

void test_block(const revit::cpu::Kernels& kernels) {
  const int64_t panel = kernels.linear.panel;
  Random random(2);
  // One of everything; less than a panel; whole panels; a hidden layer of two ragged chunks, of three; more channels
  // than a chain.
  for (const Shape& shape : {Shape{1, 1, 1, Activation::kRelu},
                             {7, 12, 5, Activation::kSilu},
                             {panel, panel, 2 * panel, Activation::kGeluTanh},
                             {40, 24, 400, Activation::kGelu},
                             {72, 64, 801, Activation::kQuickGelu},
                             {400, 257, 100, Activation::kNone},
                             {1, 1, 1, Activation::kRelu, true, true},
                             {40, 24, 400, Activation::kSilu, true, false},
                             {72, 64, 801, Activation::kGelu, false, true},
                             {panel, panel + 3, 2 * panel + 1, Activation::kSilu, true, true}}) {
    test_tiles(kernels, shape, random);
  }
  for (const int64_t head_dim : {2, 6, 16, 20, 64, 72}) {
    for (const int64_t n_heads : {1, 3}) {
      for (const HeadsCase& c : {HeadsCase{n_heads, head_dim, false, false, true, false},
                                 {n_heads, head_dim, true, false, true, true},
                                 {n_heads, head_dim, false, true, false, false},
                                 {n_heads, head_dim, true, true, true, false}}) {
        test_heads(kernels, c, random);
      }
    }
  }
  test_max_rows(kernels);
  for (const int64_t n_channels : {1, 3, 7, 16, 31, 67, 150, 384}) {
    for (const int64_t n_rows : {1, 2, 5, 13}) test_norm(kernels, n_rows, n_channels, random);
  }
  for (const int64_t depth : kDepths) {
    for (const int64_t n_channels : {int64_t{1}, panel, 2 * panel + 3}) test_embed(kernels, n_channels, depth, random);
  }
}

}  // namespace native
