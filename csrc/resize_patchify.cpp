// resize_patchify: 8-bit images of any sizes to the patch rows of one pack. Weights are those of Pillow's Resample.c.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "parallel.h"

namespace revit {
namespace {

using cpu::TapPair;

// Convolution kernel of bicubic interpolation with a = -0.5 (Keys 1981), or the triangle of bilinear interpolation.
// The order of operations is Pillow's: weights must come out with the same bits.
inline double filter(bool bicubic, double x) {
  x = std::fabs(x);
  if (!bicubic) return x < 1.0 ? 1.0 - x : 0.0;
  const double near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
  const double far = (((x - 5) * x + 8) * x - 4) * -0.5;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}

// Owns the weights of one axis.
class Axis {
 public:
  // Resamples [begin, end) of `n_in` pixels to `n_out` pixels. Box edges are float and their difference is taken in
  // float, as in Pillow. With `even`, taps start at even inputs; if necessary a tap of weight 0 is put before them.
  Axis(int32_t n_in, float begin, float end, int32_t n_out, bool bicubic, bool even) : first_(n_out), n_taps_(n_out) {
    const double scale = static_cast<double>(end - begin) / n_out;
    const double filter_scale = std::max(scale, 1.0);
    const double support = (bicubic ? 2.0 : 1.0) * filter_scale;
    const double inverse_scale = 1.0 / filter_scale;
    for (int32_t i = 0; i < n_out; ++i) {
      const double center = begin + (i + 0.5) * scale;
      first_[i] = static_cast<int32_t>(std::max(center - support + 0.5, 0.0));
      const int32_t last = static_cast<int32_t>(std::min(center + support + 0.5, static_cast<double>(n_in)));
      n_taps_[i] = last - first_[i];  // at least 1: the support reaches a pixel to either side
      max_taps_ = std::max(max_taps_, n_taps_[i] + (even ? first_[i] % 2 : 0));
    }
    pairs_stride_ = (max_taps_ + 1) / 2;
    pairs_.resize(pairs_stride_ * n_out);
    std::vector<double> weights(max_taps_);
    for (int32_t i = 0; i < n_out; ++i) {
      const double center = begin + (i + 0.5) * scale;
      for (int32_t t = 0; t < n_taps_[i]; ++t) {
        weights[t] = filter(bicubic, (t + first_[i] - center + 0.5) * inverse_scale);
      }
      double total = 0.0;
      for (int32_t t = 0; t < n_taps_[i]; ++t) total += weights[t];
      const int32_t lead = even ? first_[i] % 2 : 0;
      quantize(weights.data(), total, n_taps_[i], lead, pairs_.data() + i * pairs_stride_);
      first_[i] -= lead;
      n_taps_[i] += lead;
    }
    reduce_identity();
  }

  cpu::ResizeAxis view() const {
    return {first_.data(), n_taps_.data(), pairs_.data(), pairs_stride_, max_taps_, identity_};
  }

 private:
  static void quantize(const double* weights, double total, int32_t n_taps, int32_t lead, TapPair* pairs) {
    for (int32_t t = 0; t < n_taps; ++t) {
      const double weight = (total != 0.0 ? weights[t] / total : weights[t]) * (1 << cpu::kWeightBits);
      const int32_t rounded = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
      TapPair& pair = pairs[(lead + t) / 2];
      pair.high[(lead + t) % 2] = static_cast<int16_t>(rounded >> cpu::kLowBits);
      pair.low[(lead + t) % 2] = static_cast<int16_t>(rounded & ((1 << cpu::kLowBits) - 1));
    }
  }

  // If the outputs are consecutive inputs, unchanged, the pass can be skipped.
  void reduce_identity() {
    std::vector<int32_t> source(first_.size());
    for (size_t i = 0; i < first_.size(); ++i) {
      int32_t n_nonzero = 0;
      for (int32_t t = 0; t < n_taps_[i]; ++t) {
        const TapPair& pair = pairs_[i * pairs_stride_ + t / 2];
        if (pair.high[t % 2] == 0 && pair.low[t % 2] == 0) continue;
        if (pair.high[t % 2] != 1 << (cpu::kWeightBits - cpu::kLowBits) || pair.low[t % 2] != 0) return;
        ++n_nonzero;
        source[i] = first_[i] + t;
      }
      if (n_nonzero != 1 || source[i] != source[0] + static_cast<int32_t>(i)) return;
    }
    first_ = source;
    std::fill(n_taps_.begin(), n_taps_.end(), 1);
    max_taps_ = 1;
    identity_ = true;
  }

  std::vector<int32_t> first_;
  std::vector<int32_t> n_taps_;
  std::vector<TapPair> pairs_;
  int64_t pairs_stride_ = 0;
  int32_t max_taps_ = 1;
  bool identity_ = false;
};

using AxisKey = std::tuple<int32_t, float, float, int32_t, bool, bool>;

// Keeps the axes of recent calls. Images of a batch, and batches of a data set, often share their axes, and computing
// the weights of a small image takes a tenth of its time.
std::shared_ptr<const Axis> shared_axis(const AxisKey& key) {
  static std::mutex mutex;
  static std::map<AxisKey, std::shared_ptr<const Axis>> axes;
  constexpr size_t kMaxAxes = 256;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = axes.find(key);
    if (found != axes.end()) return found->second;
  }
  const auto [n_in, begin, end, n_out, bicubic, even] = key;
  auto axis = std::make_shared<const Axis>(n_in, begin, end, n_out, bicubic, even);
  const std::lock_guard<std::mutex> lock(mutex);
  if (axes.size() >= kMaxAxes) axes.clear();
  axes[key] = axis;
  return axis;
}

constexpr std::align_val_t kScratchAlign{64};
struct FreeScratch {
  void operator()(uint8_t* p) const { ::operator delete(p, kScratchAlign); }
};
using Scratch = std::unique_ptr<uint8_t[], FreeScratch>;

struct Band {
  int64_t image;
  int32_t begin;
  int32_t end;
};

// Bands of patch rows: one band per image if there are enough images, else as many bands as keep the threads busy.
std::vector<Band> divide(const std::vector<cpu::ResizeArgs>& images, const int64_t* sizes, int64_t n_threads) {
  const int64_t n_images = static_cast<int64_t>(images.size());
  const int64_t per_image = n_images >= 2 * n_threads ? 1 : (2 * n_threads + n_images - 1) / n_images;
  std::vector<Band> bands;
  for (int64_t b = 0; b < n_images; ++b) {
    const int64_t patch = images[b].patch_size, grid_height = sizes[2 * b] / patch;
    const int64_t n_bands = n_threads == 1 ? 1 : std::min(per_image, grid_height);
    for (int64_t i = 0; i < n_bands; ++i) {
      bands.push_back({b, static_cast<int32_t>(grid_height * i / n_bands * patch),
                       static_cast<int32_t>(grid_height * (i + 1) / n_bands * patch)});
    }
  }
  return bands;
}

Tensor resize_patchify(std::vector<Tensor> images, Tensor boxes, Tensor sizes, int64_t patch_size,
                       std::optional<Tensor> table, bool bicubic, int64_t n_rows) {
  const int64_t batch = static_cast<int64_t>(images.size());
  STD_TORCH_CHECK(batch >= 1, "images must not be empty");
  STD_TORCH_CHECK(patch_size >= 1 && patch_size <= 1 << 15, "patch_size must be in [1, 32768], got ", patch_size);
  STD_TORCH_CHECK(boxes.is_cpu() && boxes.scalar_type() == ScalarType::Double && boxes.dim() == 2 &&
                      boxes.size(0) == batch && boxes.size(1) == 4,
                  "boxes must be a float64 CPU tensor [n_images = ", batch, ", 4]");
  STD_TORCH_CHECK(sizes.is_cpu() && sizes.scalar_type() == ScalarType::Long && sizes.dim() == 2 &&
                      sizes.size(0) == batch && sizes.size(1) == 2,
                  "sizes must be an int64 CPU tensor [n_images = ", batch, ", 2]");
  boxes = revit::contiguous(boxes);
  sizes = revit::contiguous(sizes);
  ScalarType out_type = ScalarType::Byte;
  int32_t element_bytes = 1;
  if (table.has_value()) {
    out_type = table->scalar_type();
    STD_TORCH_CHECK(out_type == ScalarType::Float || out_type == ScalarType::BFloat16 || out_type == ScalarType::Half,
                    "table must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(table->is_cpu() && table->dim() == 2 && table->size(0) == 3 && table->size(1) == 256,
                    "table must be a CPU tensor [3, 256]");
    table = revit::contiguous(*table);
    element_bytes = out_type == ScalarType::Float ? 4 : 2;
  }

  const double* box = static_cast<const double*>(boxes.const_data_ptr());
  const int64_t* size = static_cast<const int64_t*>(sizes.const_data_ptr());
  std::vector<std::shared_ptr<const Axis>> axes;  // keeps alive what `args` points to
  std::vector<cpu::ResizeArgs> args(batch);
  std::vector<int64_t> first_row(batch + 1, 0);
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor& image = images[b];
    STD_TORCH_CHECK(image.is_cpu() && image.scalar_type() == ScalarType::Byte, "images[", b,
                    "] must be uint8, on the CPU");
    STD_TORCH_CHECK(image.dim() == 3 && (image.size(2) == 3 || image.size(2) == 1), "images[", b,
                    "] must have shape [H, W, 3] or [H, W, 1]");
    const int64_t height = image.size(0), width = image.size(1), out_height = size[2 * b], out_width = size[2 * b + 1];
    constexpr int64_t kMaxSide = 1 << 24;  // box edges are float
    STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= kMaxSide && width <= kMaxSide, "images[", b, "] is ", height,
                    "x", width, " px; sides must be in [1, 2^24]");
    STD_TORCH_CHECK(out_height >= patch_size && out_width >= patch_size && out_height <= kMaxSide &&
                        out_width <= kMaxSide && out_height % patch_size == 0 && out_width % patch_size == 0,
                    "sizes[", b, "] must be positive multiples of patch_size ", patch_size, ", got ", out_height, "x",
                    out_width);
    float edges[4];
    for (int i = 0; i < 4; ++i) edges[i] = static_cast<float>(box[4 * b + i]);
    // Written so that NaN fails.
    STD_TORCH_CHECK(edges[0] >= 0 && edges[1] >= 0 && edges[2] <= static_cast<float>(width) &&
                        edges[3] <= static_cast<float>(height) && edges[0] < edges[2] && edges[1] < edges[3],
                    "boxes[", b, "] must be a non-empty (left, upper, right, lower) within the image of ", height, "x",
                    width, " px");
    first_row[b + 1] = first_row[b] + out_height / patch_size * (out_width / patch_size);
    args[b].image = static_cast<const uint8_t*>(image.const_data_ptr());
    args[b].stride_y = image.stride(0);
    args[b].stride_x = image.stride(1);
    args[b].stride_c = image.size(2) == 1 ? 0 : image.stride(2);
    args[b].height = static_cast<int32_t>(height);
    args[b].width = static_cast<int32_t>(width);
    args[b].out_width = static_cast<int32_t>(out_width);
    args[b].patch_size = static_cast<int32_t>(patch_size);
    axes.push_back(shared_axis({args[b].width, edges[0], edges[2], args[b].out_width, bicubic, true}));
    args[b].horizontal = axes.back()->view();
    axes.push_back(shared_axis({args[b].height, edges[1], edges[3], static_cast<int32_t>(out_height), bicubic, false}));
    args[b].vertical = axes.back()->view();
    // Pillow 13 runs the vertical pass first if it shrinks the image by far more; the box does not matter for this.
    args[b].vertical_first = height - out_height > 0 && height - out_height > 2 * (width - out_width);
    args[b].table = table.has_value() ? table->const_data_ptr() : nullptr;
    args[b].element_bytes = element_bytes;
  }
  STD_TORCH_CHECK(first_row[batch] == n_rows, "n_rows must be the number of patches of all sizes, ", first_row[batch],
                  ", got ", n_rows);

  const int64_t row_values = 3 * patch_size * patch_size;
  Tensor out = torch::stable::empty({n_rows, row_values}, out_type);
  for (int64_t b = 0; b < batch; ++b) {
    args[b].out = static_cast<uint8_t*>(out.mutable_data_ptr()) + first_row[b] * row_values * element_bytes;
  }
  const cpu::ResizeKernels& kernels = cpu::kernels().resize;
  const std::vector<Band> bands = divide(args, size, static_cast<int64_t>(torch::stable::get_num_threads()));
  for_each_task(static_cast<int64_t>(bands.size()), [&](int64_t i) {
    const Band& band = bands[i];
    const cpu::ResizeArgs& image = args[band.image];
    const Scratch scratch(static_cast<uint8_t*>(::operator new(kernels.scratch_bytes(image), kScratchAlign)));
    kernels.rows(image, band.begin, band.end, scratch.get());
  });
  return out;
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CPU, m) { m.impl("resize_patchify", TORCH_BOX(&revit::resize_patchify)); }
