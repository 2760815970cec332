// Peak rate of one multiply-add instruction: independent chains in registers, no memory traffic.
//
// It is compiled once for every instruction, with the compiler's flags for that and one of the macros below. A step of a
// chain multiplies two registers and adds to a third. CHAINS of them cover the latency of two units (4 or 5 cycles each)
// and fit the 16 registers of AVX2 beside the two factors. They are named one by one: held in an array, GCC may keep them
// in memory.

#include <stdint.h>

#define CHAINS 12
#define FOR_ALL_CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

// Each part gives the vector's bytes, the operations of one lane of 32 bits in a step (two for a multiply-add), the bits
// of the factors in such a lane, and the step. Instructions are written out, as GCC 12 copies and spills the sums around
// its functions for them; volatile keeps it from multiplying the same factors only once.
#if defined(FMA)  // FMA is the number of bytes; the compiler contracts the two operations
  #define BYTES FMA
  #define OPS_OF_LANE 2
  #define LEFT 0x3f7fbe77   // 0.999: below one, it keeps every chain at a normal number
  #define RIGHT 0x3a83126f  // 0.001
typedef float Vector __attribute__((vector_size(BYTES)));
  #define STEP(i) v##i = v##i * left + right;

#elif defined(VDPBF16PS)  // pairs of bfloat16
  #define BYTES VDPBF16PS
  #define OPS_OF_LANE 4
  #define LEFT 0x3f80bf80   // -1, 1
  #define RIGHT 0x3f803f80  // 1, 1
typedef float Vector __attribute__((vector_size(BYTES)));
  #define STEP(i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(v##i) : "v"(left), "v"(right));

#elif defined(VPDPBUSD)  // quadruples of 8-bit integers
  #define BYTES VPDPBUSD
  #define OPS_OF_LANE 8
  #define LEFT 0x7f010203
  #define RIGHT 0x01fe7f80
typedef uint32_t Vector __attribute__((vector_size(BYTES)));
  #if BYTES == 32
    #define NAME "%{vex%} vpdpbusd"
  #else
    #define NAME "vpdpbusd"
  #endif
  #define STEP(i) __asm__ volatile(NAME " %2, %1, %0" : "+v"(v##i) : "v"(left), "v"(right));

#elif defined(VPMADDWD)  // pairs of 16-bit integers; sums need a second instruction
  #define BYTES VPMADDWD
  #define OPS_OF_LANE 4
  #define LEFT 0x007f0002
  #define RIGHT 0x0003ff81
typedef uint32_t Vector __attribute__((vector_size(BYTES)));
  #define STEP(i)                                    \
    {                                                \
      Vector product;                                \
      __asm__ volatile(                              \
          "vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" \
          : "+v"(v##i), "=&v"(product)               \
          : "v"(left), "v"(right));                  \
    }
#endif

typedef uint32_t Lanes __attribute__((vector_size(BYTES)));

// Volatile keeps the compiler from computing the chains itself.
static volatile uint32_t left_bits = LEFT, right_bits = RIGHT, sink;

#define DECLARE(i) Vector v##i = (Vector)(zero + (0x3f800000u + i));  // float32 numbers a little over one
#define ADD(i) all ^= (Lanes)v##i;

// Runs `steps` steps of all chains on the calling thread and returns the operations done.
double peak_run(int64_t steps) {
  const Lanes zero = {0};
  const Vector left = (Vector)(zero + left_bits), right = (Vector)(zero + right_bits);
  FOR_ALL_CHAINS(DECLARE)
  for (int64_t i = 0; i < steps; ++i) {
    FOR_ALL_CHAINS(STEP)
  }
  Lanes all = zero;
  FOR_ALL_CHAINS(ADD)
  sink = all[0];
  return (double)OPS_OF_LANE * CHAINS * (BYTES / 4) * (double)steps;
}
