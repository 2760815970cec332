#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "native_test.h"

namespace native {
namespace {

using revit::cpu::ResizeArgs;
using revit::cpu::ResizeAxis;
using revit::cpu::TapPair;

// Random taps with random signed weights that sum to one, in windows that move along the input.
struct Axis {
  std::vector<int32_t> first, n_taps, weights;
  std::vector<TapPair> pairs;
  int32_t max_taps;

  Axis(int32_t n_in, int32_t n_out, int32_t longest, bool even, std::mt19937& random)
      : first(n_out), n_taps(n_out), max_taps(std::min(longest, n_in)) {
    const int64_t stride = (max_taps + 1) / 2;
    weights.assign(n_out * stride * 2, 0);
    pairs.assign(n_out * stride, TapPair{});
    for (int32_t i = 0; i < n_out; ++i) {
      first[i] = static_cast<int32_t>(static_cast<int64_t>(n_in - 1) * i / std::max(n_out - 1, 1));
      if (even) first[i] -= first[i] % 2;
      n_taps[i] = std::min<int32_t>(max_taps - static_cast<int32_t>(random() % std::min(2, max_taps)), n_in - first[i]);
      int32_t left = 1 << revit::cpu::kWeightBits;
      for (int32_t t = 0; t < n_taps[i]; ++t) {
        const int32_t drawn = (1 << 20) - static_cast<int32_t>(random() % (3 << 20)) / (t + 1);
        const int32_t weight = t + 1 == n_taps[i] ? left : drawn / n_taps[i];
        left -= weight;
        weights[(i * stride + t / 2) * 2 + t % 2] = weight;
        TapPair& pair = pairs[i * stride + t / 2];
        pair.high[t % 2] = static_cast<int16_t>(weight >> revit::cpu::kLowBits);
        pair.low[t % 2] = static_cast<int16_t>(weight & ((1 << revit::cpu::kLowBits) - 1));
      }
    }
  }

  int64_t stride() const { return (max_taps + 1) / 2; }
  ResizeAxis view() const { return {first.data(), n_taps.data(), pairs.data(), stride(), max_taps, false}; }

  // Output `i` in exact arithmetic: sums of this size are integers in a double.
  template <class Read>
  double at(int32_t i, const Read& read) const {
    double sum = 1 << (revit::cpu::kWeightBits - 1);
    for (int32_t t = 0; t < n_taps[i]; ++t) {
      sum += static_cast<double>(weights[(i * stride() + t / 2) * 2 + t % 2]) * read(first[i] + t);
    }
    return std::min(std::max(std::floor(sum / (1 << revit::cpu::kWeightBits)), 0.0), 255.0);
  }
};

struct FreeAligned {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// One image of exact size on the heap: packed, or one grey channel, resampled in two bands.
void test_case(const revit::cpu::Kernels& kernels, int32_t height, int32_t width, int32_t out_height, int32_t out_width,
               int32_t patch, bool grey, bool vertical_first) {
  std::mt19937 random(static_cast<uint32_t>(height * 1000 + width));
  const int32_t channels = grey ? 1 : 3;
  const std::unique_ptr<uint8_t[]> image(new uint8_t[height * width * channels]);
  for (int32_t i = 0; i < height * width * channels; ++i) image[i] = static_cast<uint8_t>(random());
  const Axis horizontal(width, out_width, 2 + width / out_width * 4, true, random);
  const Axis vertical(height, out_height, 1 + height / out_height * 4, false, random);
  std::vector<uint32_t> table(3 * 256);
  for (uint32_t i = 0; i < table.size(); ++i) table[i] = i * 1000003u;
  std::vector<uint32_t> out(out_height * out_width * 3);

  ResizeArgs args = {};
  args.image = image.get();
  args.stride_y = width * channels;
  args.stride_x = channels;
  args.stride_c = grey ? 0 : 1;
  args.height = height;
  args.width = width;
  args.out_width = out_width;
  args.patch_size = patch;
  args.horizontal = horizontal.view();
  args.vertical = vertical.view();
  args.vertical_first = vertical_first;
  args.table = table.data();
  args.element_bytes = 4;
  args.out = out.data();
  const int32_t middle = out_height / 2;
  for (const auto& band : {std::pair<int32_t, int32_t>{0, middle}, {middle, out_height}}) {
    if (band.first == band.second) continue;
    const std::unique_ptr<uint8_t[], FreeAligned> scratch(static_cast<uint8_t*>(
        ::operator new(static_cast<size_t>(kernels.resize.scratch_bytes(args)), std::align_val_t{64})));
    kernels.resize.rows(args, band.first, band.second, scratch.get());
  }

  bool equal = true;
  for (int32_t y = 0; y < out_height; ++y) {
    for (int32_t x = 0; x < out_width; ++x) {
      for (int32_t c = 0; c < 3; ++c) {
        const auto source = [&](int32_t sy, int32_t sx) {
          return static_cast<double>(image[(sy * width + sx) * channels + (grey ? 0 : c)]);
        };
        const auto across = [&](int32_t sy) { return horizontal.at(x, [&](int32_t sx) { return source(sy, sx); }); };
        const auto down = [&](int32_t sx) { return vertical.at(y, [&](int32_t sy) { return source(sy, sx); }); };
        const double value = vertical_first ? horizontal.at(x, down) : vertical.at(y, across);
        const int32_t place = ((y / patch * (out_width / patch) + x / patch) * patch + y % patch) * patch + x % patch;
        equal = equal && out[place * 3 + c] == table[256 * c + static_cast<int32_t>(value)];
      }
    }
  }
  CHECK(equal);
}

}  // namespace

void test_resize(const revit::cpu::Kernels& kernels) {
  for (const bool vertical_first : {false, true}) {
    for (const bool grey : {false, true}) {
      test_case(kernels, 1, 1, 1, 1, 1, grey, vertical_first);
      test_case(kernels, 7, 5, 2, 2, 1, grey, vertical_first);
      test_case(kernels, 5, 31, 6, 4, 2, grey, vertical_first);
      test_case(kernels, 33, 13, 14, 21, 7, grey, vertical_first);
      test_case(kernels, 61, 3, 16, 32, 16, grey, vertical_first);
      test_case(kernels, 2, 97, 4, 12, 4, grey, vertical_first);
    }
  }
}

}  // namespace native
