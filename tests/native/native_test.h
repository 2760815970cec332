// The smallest test harness that serves: a check that counts, prints what failed and goes on.
#pragma once

#include <cstdio>

#include "cpu/kernels.h"

namespace native {

extern int checks;
extern int failures;

inline void check(bool ok, const char* condition, const char* isa, const char* file, int line) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("%s:%d [%s] failed: %s\n", file, line, isa, condition);
}

void test_attention(const revit::cpu::Kernels& kernels);
void test_block(const revit::cpu::Kernels& kernels);
void test_layer_norm(const revit::cpu::Kernels& kernels);
void test_linear(const revit::cpu::Kernels& kernels);
void test_resize(const revit::cpu::Kernels& kernels);
void test_tokens(const revit::cpu::Kernels& kernels);

}  // namespace native

#define CHECK(condition) native::check((condition), #condition, kernels.isa, __FILE__, __LINE__)
