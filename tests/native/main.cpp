// Runs the kernels of the instruction sets that its argument names, by default of all that this machine can execute, on
// ragged sizes, on heap buffers of exact size. Built with AddressSanitizer and UndefinedBehaviorSanitizer, it fails on
// any access outside of them.
#include <set>
#include <sstream>
#include <string>

#include "cpu/self_check.h"
#include "native_test.h"

namespace native {
int checks = 0;
int failures = 0;
}  // namespace native

int main(int n_arguments, char** arguments) {
  std::set<decltype(revit::cpu::AttentionKernels::forward_rounded)> whole;  // sets whose other kernels were tested
  std::istringstream isas(n_arguments > 1 ? arguments[1] : revit::cpu::available_isas());
  for (std::string isa; isas >> isa;) {
    if (!revit::cpu::select_isa(isa.c_str())) return 2;
    const revit::cpu::Kernels& kernels = revit::cpu::kernels();
    CHECK(revit::cpu::computes_right(kernels));
    native::test_block(kernels);
    native::test_linear(kernels);
    if (whole.insert(kernels.attention.forward_rounded).second) {
      native::test_attention(kernels);
      native::test_layer_norm(kernels);
      native::test_resize(kernels);
      native::test_tokens(kernels);
    }
    std::printf("%s: %d checks, %d failures\n", isa.c_str(), native::checks, native::failures);
  }
  return native::failures == 0 && native::checks > 0 ? 0 : 1;
}
