// Portable kernels: four lanes, whatever vector instructions the platform guarantees (SSE2, NEON).
#include "cpu/prelude.h"

#define REVIT_ISA baseline
#define REVIT_LANES 4
#define REVIT_F16C 0
#define REVIT_AVX512 0
#define REVIT_BF16 0
#define REVIT_VNNI 0
#define REVIT_AMX 0
#include "cpu/kernels.inl.h"
