#pragma once

namespace revit::cpu {

struct TokenKernels {};

}  // namespace revit::cpu
