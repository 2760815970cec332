// Classifies images by a packed AOTInductor package of revit-fast, without Python (docs/export.md):
//
//   classify path/to/revit_fast/_C.so model.pt2 14,7 a.ppm b.ppm c.ppm
//
// Images are binary PPM files; the grids are given to them in turn. Every image of the call is part of one pack. A line
// of tab-separated text is printed for each: file, grid, the best class, all logits.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

// A number, or the numbers of a list, written as JSON.
std::vector<double> numbers(const std::string& json) {
  std::vector<double> values;
  const char* at = json.c_str();
  while (*at != '\0') {
    char* end;
    const double value = std::strtod(at, &end);
    if (end == at) {
      ++at;  // a bracket, comma or space
    } else {
      values.push_back(value);
      at = end;
    }
  }
  return values;
}

// How the model wants its images: the settings that every package carries.
struct Settings {
  std::vector<double> mean, std;
  double crop_pct;
  int64_t patch_size;
  bool bicubic;

  explicit Settings(const std::unordered_map<std::string, std::string>& metadata)
      : mean(numbers(metadata.at("mean"))),
        std(numbers(metadata.at("std"))),
        crop_pct(numbers(metadata.at("crop_pct"))[0]),
        patch_size(static_cast<int64_t>(numbers(metadata.at("patch_size"))[0])),
        bicubic(metadata.at("interpolation") == "\"bicubic\"") {}
};

// A binary PPM file with 8 bits a channel and no comments, as uint8 [H, W, 3].
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();  // the one white space before the pixels
  if (!file || magic != "P6" || largest != 255 || width < 1 || height < 1) {
    throw std::runtime_error(path + ": expected a binary PPM file (P6) with 8 bits a channel");
  }
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel());
  if (!file) throw std::runtime_error(path + ": ends before its last pixel");
  return pixels;
}

// The region (left, upper, right, lower) that the model sees: eval_box of revit_fast/adaptive/crops.py.
std::vector<double> eval_box(int64_t height, int64_t width, int64_t image_px, double crop_pct) {
  const auto scaled = static_cast<int64_t>(std::floor(image_px / crop_pct));
  const int64_t shorter = std::min(height, width), longer = std::max(height, width);
  const auto longer_scaled = static_cast<int64_t>(static_cast<double>(scaled * longer) / shorter);
  const int64_t out_height = height <= width ? scaled : longer_scaled;
  const int64_t out_width = height <= width ? longer_scaled : scaled;
  const double top = std::nearbyint((out_height - image_px) / 2.0), left = std::nearbyint((out_width - image_px) / 2.0);
  const double right = (left + image_px) * width / out_width, bottom = (top + image_px) * height / out_height;
  return {left * width / out_width, top * height / out_height, std::min<double>(right, width),
          std::min<double>(bottom, height)};
}

// Images as normalised patch rows [T, P * P * 3] of one pack, each at its grid.
at::Tensor pack(const std::vector<at::Tensor>& images, const std::vector<int64_t>& grids, const Settings& settings) {
  std::vector<double> boxes;
  std::vector<int64_t> sizes;
  int64_t n_rows = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t image_px = grids[i] * settings.patch_size;
    const auto box = eval_box(images[i].size(0), images[i].size(1), image_px, settings.crop_pct);
    boxes.insert(boxes.end(), box.begin(), box.end());
    sizes.insert(sizes.end(), {image_px, image_px});
    n_rows += grids[i] * grids[i];
  }
  const auto channel = [](const std::vector<double>& values) { return at::tensor(values, at::kFloat).unsqueeze(1); };
  const at::Tensor levels = at::arange(256, at::kFloat).div(255).expand({3, 256});
  const at::Tensor table = levels.sub(channel(settings.mean)).div(channel(settings.std));
  using Resize = at::Tensor(at::TensorList, const at::Tensor&, const at::Tensor&, c10::SymInt,
                            const std::optional<at::Tensor>&, bool, c10::SymInt);
  static const auto resize =
      c10::Dispatcher::singleton().findSchemaOrThrow("revit_fast::resize_patchify", "").typed<Resize>();
  return resize.call(images, at::tensor(boxes, at::kDouble).view({-1, 4}), at::tensor(sizes, at::kLong).view({-1, 2}),
                     settings.patch_size, table, settings.bicubic, n_rows);
}

int run(const std::string& library, const std::string& package, const std::string& grid_list,
        const std::vector<std::string>& paths) {
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());  // registers revit_fast::*
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);  // a tensor of another dtype or width is an error, not garbage
  torch::inductor::AOTIModelPackageLoader model(package);
  const Settings settings(model.get_metadata());

  const std::vector<double> chosen = numbers(grid_list);
  if (chosen.empty()) throw std::runtime_error("grids: expected one or more such as 14,7, got '" + grid_list + "'");
  std::vector<at::Tensor> images;
  std::vector<int64_t> grids;
  for (const auto& path : paths) {
    grids.push_back(static_cast<int64_t>(chosen[images.size() % chosen.size()]));
    images.push_back(read_ppm(path));
  }
  const at::Tensor grid_hw = at::tensor(grids, at::kInt).unsqueeze(1).repeat({1, 2});
  const at::Tensor logits = model.run({pack(images, grids, settings), grid_hw})[0];

  for (size_t i = 0; i < paths.size(); ++i) {
    const at::Tensor own = logits[static_cast<int64_t>(i)].contiguous();
    std::printf("%s\t%ld\t%ld", paths[i].c_str(), static_cast<long>(grids[i]), own.argmax().item<long>());
    for (int64_t c = 0; c < own.numel(); ++c) std::printf("\t%.9g", own.data_ptr<float>()[c]);
    std::printf("\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s _C.so MODEL.pt2 GRID[,GRID...] IMAGE.ppm...\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3], {argv + 4, argv + argc});
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s: error: %s\n", argv[0], error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: error: %s\n", argv[0], error.what());
    return 1;
  }
}
