#include "native_test.h"

namespace native {

void test_resize(const revit::cpu::Kernels& kernels) { CHECK(kernels.isa != nullptr); }

}  // namespace native
