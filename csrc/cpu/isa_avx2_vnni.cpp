// The products of avxvnni in portable vectors, compiled for AVX2, so that their logic is tested everywhere.
#if defined(__x86_64__)
  #include "cpu/prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC target("avx2,fma,f16c")
  #endif

  #define REVIT_ISA avx2_vnni
  #define REVIT_LANES 8
  #define REVIT_F16C 1
  #define REVIT_AVX512 0
  #define REVIT_BF16 0
  #define REVIT_VNNI REVIT_EMULATED
  #define REVIT_AMX 0
  #define REVIT_BASE avx2
  #include "cpu/kernels.inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
