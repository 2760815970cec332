#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#if defined(__x86_64__)
  #include <cpuid.h>
#endif
#if defined(__linux__)
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

#include "cpu/kernels.h"
#include "cpu/self_check.h"

namespace revit::cpu {
namespace {

struct Candidate {
  Kernels kernels;
  bool supported;
};

Kernels completed(const NarrowProducts& products) {
  Kernels all = *products.base;
  all.isa = products.isa;
  all.linear.integer_depths = products.integer_depths;
  for (int type = 0; type < kWeightTypes; ++type) {
    if (products.linear[type] == nullptr) continue;
    all.linear.tile[type] = products.linear[type];
    all.block.max_rows[type] = products.max_rows[type];
    all.block.tile[type] = products.block[type];
  }
  if (products.embed != nullptr) all.block.embed[static_cast<int>(WeightType::kBFloat16)] = products.embed;
  return all;
}

#if defined(__x86_64__)
// What neither compiler's __builtin_cpu_supports knows everywhere.
struct Cpuid {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;

  Cpuid(unsigned int leaf, unsigned int subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool has_avxvnni() { return Cpuid(7, 1).eax >> 4 & 1; }

// The instructions of AMX for both narrow types, the system's saving of their registers, and its permission for this
// process, which Linux gives on request.
bool has_amx() {
  const unsigned int kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kWanted = kBFloat16 | kTile | kInt8;
  const bool saves = Cpuid(1, 0).ecx >> 27 & 1;  // OSXSAVE: xgetbv may be executed
  if (!saves || (Cpuid(7, 0).edx & kWanted) != kWanted) return false;
  unsigned int low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const unsigned int kTileState = 3u << 17;  // configuration and data
  if ((low & kTileState) != kTileState) return false;
  #if defined(__linux__)
  const long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  #else
  return false;
  #endif
}
#endif

// The best comes first. Those that compute in portable vectors what other processors have instructions for come last,
// because they are never the better choice.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> known = [] {
    std::vector<Candidate> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    // Not all of these have been executed where this was written, so each shows first that it computes.
    const auto add_checked = [&](const Kernels& kernels, bool supported) {
      all.push_back({kernels, supported && computes_right(kernels)});
    };
    add_checked(completed(amx::kernels), bf16 && has_amx());
    add_checked(avx512_bf16::kernels, bf16);
    add_checked(completed(avx512_vnni::kernels), vnni);
    all.push_back({avx512::kernels, avx512});
    add_checked(completed(avxvnni::kernels), avx2 && has_avxvnni());
    all.push_back({avx2::kernels, avx2});
#endif
    all.push_back({baseline::kernels, true});
#if defined(__x86_64__)
    all.push_back({avx2x16::kernels, avx2});
    all.push_back({completed(avx2_vnni::kernels), avx2});
    all.push_back({completed(avx2_amx::kernels), avx2});
#endif
    return all;
  }();
  return known;
}

const Kernels* find(const char* isa) {
  for (const Candidate& c : candidates()) {
    if (c.supported && (isa == nullptr || std::strcmp(isa, c.kernels.isa) == 0)) return &c.kernels;
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
    std::string joined;
    for (const Candidate& c : candidates()) {
      if (c.supported) joined += (joined.empty() ? "" : " ") + std::string(c.kernels.isa);
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
