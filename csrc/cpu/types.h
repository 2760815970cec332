// Element types that the CPU kernels read and write, and the type in which each is computed.
#pragma once

#include <cstdint>

namespace revit::cpu {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
inline constexpr int kDTypes = 4;

// Storage-only 16-bit types: kernels widen them to float on load and round to nearest even on store.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which a kernel computes on elements of type T: float for everything but double.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

}  // namespace revit::cpu
