// What the tests of linear.h and block.h share: sizes, numbers, packed weights, and the truth in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/linear.h"

namespace native {

using Random = std::mt19937;
using revit::cpu::Activation;
using revit::cpu::WeightType;

// Below, at and beyond every block and half block of rows; one depth and a few, odd ones and even, one chain and
// several.
inline constexpr int64_t kRowCounts[] = {1, 2, 3, 5, 6, 7, 11, 12, 13, 72};
inline constexpr int64_t kMostRows = 72;
inline constexpr int64_t kDepths[] = {1, 2, 3, 7, 64, 255, 256, 257, 385, 800};

// Fills what a kernel may read without using it, and what it must leave alone.
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A whole number in [first, first + count).
inline float whole_number(Random& random, int first, int count) {
  return static_cast<float>(first + static_cast<int>(random() % static_cast<uint32_t>(count)));
}

// A number in [-1, 1).
inline float uniform(Random& random) {
  return static_cast<float>(static_cast<int32_t>(random() >> 8) - (1 << 23)) / static_cast<float>(1 << 23);
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The upper half of the bits; exact for numbers of at most eight significant bits.
inline uint16_t bfloat16_bits(float value) { return static_cast<uint16_t>(bits_of(value) >> 16); }

inline float truncated_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// out = x weight' + bias with weights that bfloat16 holds exactly.
struct Layer {
  int64_t n_out, depth;
  std::vector<float> weight, bias;  // [n_out, depth], [n_out]

  double operator()(const double* x, int64_t n) const {
    double sum = bias[n];
    for (int64_t k = 0; k < depth; ++k) sum += x[k] * weight[n * depth + k];
    return sum;
  }
};

// Weights in multiples of 1/64 up to 1/16, biases up to 1.
inline Layer exact_layer(int64_t n_out, int64_t depth, Random& random) {
  Layer layer = {n_out, depth, std::vector<float>(n_out * depth), std::vector<float>(n_out)};
  for (float& w : layer.weight) w = whole_number(random, -4, 9) / 64;
  for (float& b : layer.bias) b = whole_number(random, -64, 129) / 64;
  return layer;
}

// Weights and rows of which int8 rounds nothing: whole numbers with a scale of one, as the largest is 127. Rows may be
// cut for their scales at multiples of kScaleUnit.
inline constexpr int64_t kScaleUnit = revit::cpu::kIntegerChainUnit;

inline Layer whole_layer(int64_t n_out, int64_t depth, Random& random) {
  Layer layer = {n_out, depth, std::vector<float>(n_out * depth), std::vector<float>(n_out)};
  for (float& w : layer.weight) w = whole_number(random, -127, 255);
  for (int64_t n = 0; n < n_out; ++n) layer.weight[n * depth + n % depth] = n % 2 ? 127 : -127;
  for (float& b : layer.bias) b = whole_number(random, -64, 129);
  return layer;
}

// Weights that keep numbers of variance one at variance one.
inline Layer random_layer(int64_t n_out, int64_t depth, Random& random) {
  Layer layer = {n_out, depth, std::vector<float>(n_out * depth), std::vector<float>(n_out)};
  const float scale = std::sqrt(3.0f / static_cast<float>(depth));
  for (float& w : layer.weight) w = truncated_to_bfloat16(scale * uniform(random));
  for (float& b : layer.bias) b = uniform(random);
  return layer;
}

// A layer's weight packed as linear.h says, in buffers of exactly that size.
class Packed {
 public:
  Packed(const Layer& layer, WeightType type, const revit::cpu::LinearKernels& kernels)
      : type_(type),
        depth_(layer.depth),
        n_panels_(round_up(layer.n_out, kernels.panel) / kernels.panel),
        bias_(n_panels_ * kernels.panel, 0.0f) {
    const bool integer = type == WeightType::kInt8, wide = type == WeightType::kFloat32;
    const int64_t panel = kernels.panel, n_columns = n_panels_ * panel;
    const int64_t depths = integer ? kernels.integer_depths : 2;  // in a lane
    const int64_t panel_size = (wide ? depth_ : round_up(depth_, integer ? 64 : 32)) * panel;
    const int64_t size = n_panels_ * panel_size;
    const int64_t chain = revit::cpu::chain_depth(depth_, revit::cpu::kMaxIntegerChain, revit::cpu::kIntegerChainUnit);
    if (wide) wide_.resize(size);
    if (type == WeightType::kBFloat16) narrow_.resize(size);
    if (integer) {
      bytes_.resize(size);
      scales_.resize(n_columns);
      if (depths == 4) offsets_.resize((depth_ + chain - 1) / chain * n_columns);
    }
    for (int64_t n = 0; n < layer.n_out; ++n) {
      const int64_t first = n / panel * panel_size, column = n % panel;
      float largest = 0;
      for (int64_t k = 0; k < depth_; ++k) largest = std::max(largest, std::fabs(layer.weight[n * depth_ + k]));
      if (integer) scales_[n] = largest / 127;
      for (int64_t k = 0; k < depth_; ++k) {
        const float w = layer.weight[n * depth_ + k];
        const int64_t beside = first + (k / depths * panel + column) * depths + k % depths;
        if (wide) wide_[first + k * panel + column] = w;
        if (type == WeightType::kBFloat16) narrow_[beside] = bfloat16_bits(w);
        if (integer && largest > 0) bytes_[beside] = static_cast<int8_t>(std::lrint(w / scales_[n]));
        if (!offsets_.empty()) offsets_[k / chain * n_columns + n] -= 128.0f * bytes_[beside];
      }
      bias_[n] = layer.bias[n];
    }
  }

  revit::cpu::PackedWeight view() const {
    const void* panels = wide_.data();
    if (type_ == WeightType::kBFloat16) panels = narrow_.data();
    if (type_ == WeightType::kInt8) panels = bytes_.data();
    return {type_, panels, bias_.data(), depth_, n_panels_, scales_.data(), offsets_.data()};
  }
  int64_t n_panels() const { return n_panels_; }

 private:
  WeightType type_;
  int64_t depth_, n_panels_;
  std::vector<float> wide_;
  std::vector<uint16_t> narrow_;
  std::vector<int8_t> bytes_;
  std::vector<float> bias_, scales_, offsets_;
};

inline double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x * std::sqrt(0.5)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(8 / std::acos(-1.0)) / 2 * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    default:
      return x;
  }
}

// Runs `body` on a new thread. Its scratch memory is new too, and exactly as large as the first call makes it.
template <class Body>
void with_new_scratch(const Body& body) {
  std::thread(std::cref(body)).join();
}

}  // namespace native
