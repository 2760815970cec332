// Standard headers that the kernels use. A translation unit includes them before it raises its target, so that their
// inline functions, which the linker may share between units, are compiled for the baseline.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/types.h"
