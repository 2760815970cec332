// Kernels for x86-64 with AVX2 and FMA (Haswell, Zen and later): eight lanes.
#if defined(__x86_64__)
  #include "cpu/prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC target("avx2,fma,f16c")
  #endif

  #define REVIT_ISA avx2
  #define REVIT_LANES 8
  #define REVIT_F16C 1
  #define REVIT_AVX512 0
  #define REVIT_BF16 0
  #define REVIT_VNNI 0
  #define REVIT_AMX 0
  #include "cpu/kernels.inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
