// The kernels of one instruction set as a table of function pointers, and the choice of a table.
//
// Everything under csrc/cpu/ works on raw pointers and does not depend on torch.
#pragma once

#include "cpu/attention.h"
#include "cpu/block.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/resize.h"
#include "cpu/tokens.h"

namespace revit::cpu {

struct Kernels {
  const char* isa;
  AttentionKernels attention;
  LayerNormKernels layer_norm;
  ResizeKernels resize;
  TokenKernels tokens;
  LinearKernels linear;
  BlockKernels block;
};

// A set that differs from `base` in products with narrow weights alone; null for those that do not differ.
struct NarrowProducts {
  const char* isa;
  const Kernels* base;
  int integer_depths;
  void (*linear[kWeightTypes])(const LinearTile&);
  int64_t (*max_rows[kWeightTypes])(const BlockWeights&);
  void (*block[kWeightTypes])(const BlockTile&);
  void (*embed)(const EmbedTile&);  // with weights of kBFloat16
};

// Constants all: code of a set must not run before it is known that this machine can execute it.
namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx2_vnni {
extern const NarrowProducts kernels;
}
namespace avxvnni {
extern const NarrowProducts kernels;
}
namespace avx2x16 {
extern const Kernels kernels;
}
namespace avx2_amx {
extern const NarrowProducts kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const NarrowProducts kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const NarrowProducts kernels;
}
#endif

// The table in use: the best that this machine can execute, or the one that REVIT_FAST_ISA names.
const Kernels& kernels();

// Names of the tables that this machine can execute, best first, separated by spaces.
const char* available_isas();

// Makes `isa` the table in use. Returns false and changes nothing if this machine cannot execute it or the name is
// unknown. For tests: do not call it while kernels run.
bool select_isa(const char* isa);

}  // namespace revit::cpu
