// Instantiates every kernel for one instruction set. The including file has included the standard headers,
// raised the compiler's target and defined
//   REVIT_ISA    the namespace and name of the set
//   REVIT_LANES  float lanes of a full-width vector
//   REVIT_F16C   1 if AVX2 and the half-precision conversion instructions may be used
//   REVIT_AVX512 1 if AVX-512 may be used
//   REVIT_BF16   how products of bfloat16 are computed: 0 in float, REVIT_NATIVE by AVX512_BF16, or REVIT_EMULATED in
//                portable vectors, with the same bits
//   REVIT_VNNI   how products of int8 are computed: 0 on pairs of int16, REVIT_NATIVE by AVX-512 VNNI or AVX-VNNI, or
//                REVIT_EMULATED
//   REVIT_AMX    how both are computed on tiles: 0 not at all, REVIT_NATIVE by AMX, or REVIT_EMULATED
//   REVIT_BASE   for a set that differs from another in these products alone: that other set, whose kernels are used
//                for everything else
// The kernels have internal linkage, so that the linker cannot confuse two sets.
#define REVIT_NATIVE 1
#define REVIT_EMULATED 2
#define REVIT_STRINGIZE_(x) #x
#define REVIT_STRINGIZE(x) REVIT_STRINGIZE_(x)

namespace revit::cpu::REVIT_ISA {
namespace {

#include "cpu/vec.inl.h"
//
#include "cpu/gemm.inl.h"
//
#include "cpu/attention.inl.h"
#include "cpu/layer_norm.inl.h"
#ifndef REVIT_BASE
  #include "cpu/resize.inl.h"
#endif
#include "cpu/tokens.inl.h"
//
#include "cpu/quantize.inl.h"
//
#include "cpu/activation.inl.h"
#include "cpu/microkernel.inl.h"
#if REVIT_AMX
  #include "cpu/tiles.inl.h"
#endif
//
#include "cpu/linear.inl.h"
//
#include "cpu/block.inl.h"

}  // namespace

#ifdef REVIT_BASE
  #if REVIT_AMX
    #define REVIT_ROUNDED(kernel) kernel<BFloat16>
  #else
    #define REVIT_ROUNDED(kernel) nullptr
  #endif
extern const NarrowProducts kernels;
const NarrowProducts kernels = {
    REVIT_STRINGIZE(REVIT_ISA),
    &REVIT_BASE::kernels,
    kIntegerDepths,
    {nullptr, REVIT_ROUNDED(linear_tile), linear_tile<int8_t>},
    {nullptr, REVIT_ROUNDED(max_block_rows), max_block_rows<int8_t>},
    {nullptr, REVIT_ROUNDED(block_tile), block_tile<int8_t>},
    REVIT_ROUNDED(embed_tile),
};
#else
extern const Kernels kernels;
const Kernels kernels = {REVIT_STRINGIZE(REVIT_ISA),
                         attention_kernels,
                         layer_norm_kernels,
                         resize_kernels,
                         token_kernels,
                         {kLinearPanel,
                          kHalfBlock,
                          kRounded<BFloat16>,
                          kIntegerDepths,
                          {linear_tile<float>, linear_tile<BFloat16>, linear_tile<int8_t>}},
                         {{max_block_rows<float>, max_block_rows<BFloat16>, max_block_rows<int8_t>},
                          max_embed_rows,
                          {block_tile<float>, block_tile<BFloat16>, block_tile<int8_t>},
                          {embed_tile<float>, embed_tile<BFloat16>},
                          norm_tile,
                          finish_attended,
                          finish_heads}};
#endif

}  // namespace revit::cpu::REVIT_ISA
