#pragma once

namespace revit::cpu {

struct AttentionKernels {};

}  // namespace revit::cpu
