#pragma once

namespace revit::cpu {

struct LayerNormKernels {};

}  // namespace revit::cpu
