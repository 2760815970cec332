#include "native_test.h"

namespace native {

void test_tokens(const revit::cpu::Kernels& kernels) { CHECK(kernels.isa != nullptr); }

}  // namespace native
