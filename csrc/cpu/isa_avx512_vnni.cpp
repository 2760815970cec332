// Kernels for x86-64 with AVX-512 and its products of int8 (Cascade Lake, Ice Lake and later).
#if defined(__x86_64__)
  #include "cpu/prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push( \
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
  #else
    #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
  #endif

  #define REVIT_ISA avx512_vnni
  #define REVIT_LANES 16
  #define REVIT_F16C 1
  #define REVIT_AVX512 1
  #define REVIT_BF16 0
  #define REVIT_VNNI REVIT_NATIVE
  #define REVIT_AMX 0
  #define REVIT_BASE avx512
  #include "cpu/kernels.inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
