#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace revit::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

constexpr int kCandidates = 5;

// The best comes first. avx2x16 comes last, because it is never the better choice.
int candidates(Candidate out[kCandidates]) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  out[n++] = {&avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")};
  out[n++] = {&avx512::kernels, avx512};
  out[n++] = {&avx2::kernels, avx2};
#endif
  out[n++] = {&baseline::kernels, true};
#if defined(__x86_64__)
  out[n++] = {&avx2x16::kernels, avx2};
#endif
  return n;
}

const Kernels* find(const char* isa) {
  Candidate all[kCandidates];
  const int n = candidates(all);
  for (int i = 0; i < n; ++i) {
    if (all[i].supported && (isa == nullptr || std::strcmp(isa, all[i].kernels->isa) == 0)) return all[i].kernels;
  }
  return nullptr;
}

// Python also reads REVIT_FAST_ISA and reports a name that is unknown or unsupported.
const Kernels* initial() {
  const char* isa = std::getenv("REVIT_FAST_ISA");
  const Kernels* chosen = isa != nullptr ? find(isa) : nullptr;
  return chosen != nullptr ? chosen : find(nullptr);
}

const Kernels*& current() {
  static const Kernels* chosen = initial();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

const char* available_isas() {
  static const std::string names = [] {
    Candidate all[kCandidates];
    const int n = candidates(all);
    std::string joined;
    for (int i = 0; i < n; ++i) {
      if (all[i].supported) joined += (joined.empty() ? "" : " ") + std::string(all[i].kernels->isa);
    }
    return joined;
  }();
  return names.c_str();
}

bool select_isa(const char* isa) {
  const Kernels* chosen = find(isa);
  if (chosen == nullptr) return false;
  current() = chosen;
  return true;
}

}  // namespace revit::cpu
