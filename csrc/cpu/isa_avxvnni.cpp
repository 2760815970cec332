// Kernels for x86-64 with AVX2 and AVX-VNNI (Alder Lake and later without AVX-512): eight lanes.
#if defined(__x86_64__)
  #include "cpu/prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
  #else
    #pragma GCC target("avx2,fma,f16c,avxvnni")
  #endif

  #define REVIT_ISA avxvnni
  #define REVIT_LANES 8
  #define REVIT_F16C 1
  #define REVIT_AVX512 0
  #define REVIT_BF16 0
  #define REVIT_VNNI REVIT_NATIVE
  #define REVIT_AMX 0
  #define REVIT_BASE avx2
  #include "cpu/kernels.inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
