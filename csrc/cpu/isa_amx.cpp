// Kernels for x86-64 with AMX's products of bfloat16 and int8 (Sapphire Rapids and later).
#if defined(__x86_64__)
  #include "cpu/prelude.h"

  #if defined(__clang__)
    #pragma clang attribute push(                                                                          \
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c"))), \
        apply_to = function)
  #else
    #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
  #endif

  #define REVIT_ISA amx
  #define REVIT_LANES 16
  #define REVIT_F16C 1
  #define REVIT_AVX512 1
  #define REVIT_BF16 REVIT_NATIVE
  #define REVIT_VNNI REVIT_NATIVE
  #define REVIT_AMX REVIT_NATIVE
  #define REVIT_BASE avx512_bf16
  #include "cpu/kernels.inl.h"

  #if defined(__clang__)
    #pragma clang attribute pop
  #endif
#endif
