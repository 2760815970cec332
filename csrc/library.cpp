// Schemas of the operators. Kernels are registered beside their code (csrc/<op>.cpp for the CPU, from Python for
// CUDA). Fakes and autograd formulas are registered in revit_fast/ops/. revit_fast/ops/_library.py repeats the schemas
// for installations without this extension; a test checks that the two are equal.
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

#ifdef __linux__
// libstdc++ asks glibc 2.32 and later whether the process has one thread, to spare atomic operations. This answer, no,
// is the library's own, so that it can be loaded with older ones too.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

namespace {

std::string cpu_isas() { return revit::cpu::available_isas(); }

std::string cpu_isa() { return revit::cpu::kernels().isa; }

void select_cpu_isa(std::string isa) {
  STD_TORCH_CHECK(revit::cpu::select_isa(isa.c_str()), "isa '", isa,
                  "' cannot be executed here; this machine has: ", revit::cpu::available_isas());
}

}  // namespace

STABLE_TORCH_LIBRARY(revit_fast, m) {
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float scale, bool causal, Tensor? tiles, SymInt[] tile_counts) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
      "float scale, bool causal, Tensor? tiles, SymInt[] tile_counts) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "tal_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, Tensor length_index, float eps, "
      "Tensor? tiles) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "tal_layer_norm_residual(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor cu_seqlens, "
      "Tensor length_index, float eps, Tensor? tiles) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "tal_layer_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor? mean, Tensor rstd, "
      "Tensor cu_seqlens, Tensor length_index, Tensor? tiles) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "assemble_tokens(Tensor patches, Tensor prefix, Tensor pos_table, Tensor pos_offset, Tensor cu_seqlens) "
      "-> Tensor");
  m.def(
      "assemble_tokens_backward(Tensor grad_tokens, Tensor pos_table, Tensor pos_offset, Tensor cu_seqlens, "
      "SymInt n_prefix) -> (Tensor grad_patches, Tensor grad_prefix, Tensor grad_pos_table)");
  m.def("mean_pool(Tensor x, Tensor cu_seqlens, SymInt skip) -> Tensor");
  m.def("mean_pool_backward(Tensor grad_out, Tensor cu_seqlens, SymInt skip, SymInt n_rows) -> Tensor");
  m.def(
      "resize_patchify(Tensor[] images, Tensor boxes, Tensor sizes, SymInt patch_size, Tensor? table, "
      "bool bicubic, SymInt n_rows) -> Tensor");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool half, bool inverse) -> (Tensor turned_q, "
      "Tensor turned_k)");
  m.def("packed_linear(Tensor x, Tensor panels, Tensor bias, SymInt n_out, SymInt activation) -> Tensor");
  m.def(
      "vit_forward(Tensor rows, Tensor cu_seqlens, Tensor length_index, Tensor pos_offset, Tensor pos_table, "
      "Tensor prefix, Tensor[] weights, Tensor descriptor, SymInt n_pooled, Tensor? rope=None) -> Tensor");
  m.def("cpu_panel() -> int");
  m.def("cpu_multiplies_bf16() -> bool");
  m.def("cpu_integer_depths() -> int");
  m.def("cpu_isas() -> str");
  m.def("cpu_isa() -> str");
  m.def("select_cpu_isa(str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("select_cpu_isa", TORCH_BOX(&select_cpu_isa));
}
