#pragma once

namespace revit::cpu {

struct ResizeKernels {};

}  // namespace revit::cpu
