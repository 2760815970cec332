// Peak rate of fused multiply-adds: independent chains in registers, no memory traffic.
//
// One step of a chain is v = v * m + a on a whole vector, 2 FLOP a lane. CHAINS of them cover the latency of two FMA
// units (4 or 5 cycles each) and fit the 16 registers of AVX2 beside m and a. They are named one by one: held in an
// array, GCC may keep them in memory.

#include <stdint.h>

#define CHAINS 12
#define FOR_ALL_CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

#if defined(__x86_64__)
  #define TARGET(isa) __attribute__((target(isa), noinline))
#else
  #define TARGET(isa) __attribute__((noinline))
#endif

// m < 1 keeps every chain at a normal number; volatile keeps the compiler from computing the chains itself.
static volatile float multiplier = 0.999f, addend = 0.001f, sink;

#define DECLARE(i) Vector v##i = m * (float)(i + 1);
#define STEP(i) v##i = v##i * m + a;
#define ADD(i) sum += v##i;

#define DEFINE_CHAINS(NAME, BYTES, ISA)                                \
  TARGET(ISA) static double NAME(int64_t steps) {                      \
    typedef float Vector __attribute__((vector_size(BYTES)));          \
    const Vector zero = {0}, m = zero + multiplier, a = zero + addend; \
    FOR_ALL_CHAINS(DECLARE)                                            \
    for (int64_t step = 0; step < steps; ++step) {                     \
      FOR_ALL_CHAINS(STEP)                                             \
    }                                                                  \
    Vector sum = zero;                                                 \
    FOR_ALL_CHAINS(ADD)                                                \
    sink = sum[0];                                                     \
    return 2.0 * CHAINS * (BYTES / sizeof(float)) * (double)steps;     \
  }

DEFINE_CHAINS(run_portable, 16, "sse2")
#if defined(__x86_64__)
DEFINE_CHAINS(run_avx2, 32, "avx2,fma")
DEFINE_CHAINS(run_avx512, 64, "avx512f")
#endif

// The widest kind of chain that this processor can execute: 2 AVX-512, 1 AVX2 with FMA, 0 portable.
int fma_widest(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Runs `steps` steps of all chains on the calling thread and returns the FLOP done. `kind` at most fma_widest().
double fma_run(int kind, int64_t steps) {
#if defined(__x86_64__)
  if (kind == 2) return run_avx512(steps);
  if (kind == 1) return run_avx2(steps);
#endif
  (void)kind;
  return run_portable(steps);
}
