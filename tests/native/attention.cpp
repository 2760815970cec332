#include "native_test.h"

namespace native {

void test_attention(const revit::cpu::Kernels& kernels) { CHECK(kernels.isa != nullptr); }

}  // namespace native
