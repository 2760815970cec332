#include "cpu/self_check.h"

#include <cstring>
#include <vector>

namespace revit::cpu {
namespace {

// More rows than a block, and depths that are no whole cache line.
constexpr int64_t kRows = 37, kDepth = 75, kColumns = 40;

// The largest number comes first in every row and column, so that int8 has a scale of one and rounds nothing.
float number(int64_t i, int64_t k) { return k == 0 ? 127.0f : static_cast<float>((i * 7 + k * 5) % 23 - 11); }

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

bool computes_right(const Kernels& kernels) {
  const LinearKernels& linear = kernels.linear;
  const int64_t panel = linear.panel, columns = round_up(kColumns, panel), rows = round_up(kRows, linear.half_block);
  std::vector<float> a(rows * kDepth), ones(columns, 1.0f), zeros(columns), offsets(columns);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t k = 0; k < kDepth; ++k) a[i * kDepth + k] = number(i, k);
  }
  for (const WeightType type : {WeightType::kBFloat16, WeightType::kInt8}) {
    const bool integer = type == WeightType::kInt8;
    const int64_t depths = integer ? linear.integer_depths : 2, size = integer ? 1 : 2;  // in a lane; bytes of a value
    const int64_t panel_depth = round_up(kDepth, 64 / size);
    std::vector<char> panels(columns * panel_depth * size);
    for (int64_t n = 0; n < kColumns; ++n) {
      offsets[n] = 0;
      for (int64_t k = 0; k < kDepth; ++k) {
        const float w = number(n + 3, k);
        char* place = panels.data() +
                      (n / panel * panel_depth * panel + (k / depths * panel + n % panel) * depths + k % depths) * size;
        char bytes[sizeof(w)];
        std::memcpy(bytes, &w, sizeof(w));
        if (integer) {
          *place = static_cast<char>(static_cast<int>(w));
          offsets[n] -= 128 * w;
        } else {
          std::memcpy(place, bytes + 2, 2);  // the upper half
        }
      }
    }
    const PackedWeight weight = {type,        panels.data(), zeros.data(), kDepth, columns / panel,
                                 ones.data(), offsets.data()};
    std::vector<float> out(rows * columns);
    linear.tile[static_cast<int>(type)](
        {a.data(), kDepth, kRows, weight, 0, columns / panel, Finish::kStore, Activation::kNone, out.data(), columns});
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t n = 0; n < kColumns; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < kDepth; ++k) sum += number(i, k) * number(n + 3, k);
        if (out[i * columns + n] != sum) return false;
      }
    }
  }
  return true;
}

}  // namespace revit::cpu
