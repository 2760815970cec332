// Instantiates every kernel for one instruction set. The including file has included the standard headers,
// raised the compiler's target and defined
//   REVIT_ISA    the namespace and name of the set
//   REVIT_LANES  float lanes of a full-width vector
//   REVIT_F16C   1 if AVX2 and the half-precision conversion instructions may be used
//   REVIT_AVX512 1 if AVX-512 may be used
//   REVIT_BF16   how products of bfloat16 are computed: 0 in float, REVIT_NATIVE by AVX512_BF16, or REVIT_EMULATED in
//                portable vectors, with the same bits
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
#include "cpu/resize.inl.h"
#include "cpu/tokens.inl.h"
//
#include "cpu/quantize.inl.h"
//
#include "cpu/linear.inl.h"
//
#include "cpu/block.inl.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {REVIT_STRINGIZE(REVIT_ISA),
                         attention_kernels,
                         layer_norm_kernels,
                         resize_kernels,
                         token_kernels,
                         linear_kernels,
                         block_kernels};

}  // namespace revit::cpu::REVIT_ISA
