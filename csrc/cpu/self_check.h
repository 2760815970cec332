// A product with a known result, for kernels that have not been executed on the hardware they are for.
#pragma once

#include "cpu/kernels.h"

namespace revit::cpu {

// Whether the products of bfloat16 and int8 of these kernels are right on one small layer: whole numbers whose sums
// every order of additions gives exactly.
bool computes_right(const Kernels& kernels);

}  // namespace revit::cpu
