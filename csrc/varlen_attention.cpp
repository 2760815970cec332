// varlen_attention on the CPU: checks, outputs, and the sharing of (sequence, head) items among threads.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "attention_plan.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "parallel.h"

namespace revit {
namespace {

using cpu::AttentionArgs;
using cpu::AttentionItem;

// `t` itself if its last dimension is contiguous, else a contiguous copy.
Tensor rows_contiguous(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
}

cpu::Heads heads_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
cpu::MutableHeads mutable_heads_of(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }

const int32_t* offsets_of(const Tensor& cu_seqlens) { return static_cast<const int32_t*>(cu_seqlens.const_data_ptr()); }

void check_max_seqlen(const std::optional<int64_t>& limit, const Tensor& cu_seqlens, const char* name) {
  if (!limit.has_value()) return;
  const int32_t* offsets = offsets_of(cu_seqlens);
  for (int64_t b = 0; b + 1 < cu_seqlens.size(0); ++b) {
    STD_TORCH_CHECK(offsets[b + 1] - offsets[b] <= *limit, name, " is ", *limit, ", but sequence ", b, " has ",
                    offsets[b + 1] - offsets[b], " rows");
  }
}

// Checks what forward and backward share. Returns the number of sequences.
int64_t check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                     const Tensor& cu_seqlens_k, const std::optional<int64_t>& max_seqlen_q,
                     const std::optional<int64_t>& max_seqlen_k) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k and v must have shape [T, H, D]");
  STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "q, k and v must be on the CPU");
  STD_TORCH_CHECK(is_floating(q), "q must be float32, bfloat16, float16 or float64");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "q, k and v must have one dtype");
  const int64_t dim = q.size(2);
  STD_TORCH_CHECK(dim >= 1 && dim <= 256, "head_dim must be 1 to 256, got ", dim);
  STD_TORCH_CHECK(k.size(2) == dim && v.size(2) == dim, "k and v must have q's head_dim ", dim, ", got ", k.size(2),
                  " and ", v.size(2));
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), "k and v must have one shape");
  STD_TORCH_CHECK(k.size(1) >= 1 && q.size(1) >= 1 && q.size(1) % k.size(1) == 0, "q has ", q.size(1),
                  " heads, which must be a positive multiple of the ", k.size(1), " heads of k and v");
  const int64_t batch = check_cu_seqlens(cu_seqlens_q, q.size(0), "cu_seqlens_q");
  STD_TORCH_CHECK(check_cu_seqlens(cu_seqlens_k, k.size(0), "cu_seqlens_k") == batch,
                  "cu_seqlens_q and cu_seqlens_k must describe the same number of sequences");
  check_max_seqlen(max_seqlen_q, cu_seqlens_q, "max_seqlen_q");
  check_max_seqlen(max_seqlen_k, cu_seqlens_k, "max_seqlen_k");
  return batch;
}

void fill_common(AttentionArgs& args, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  args.q = heads_of(q);
  args.k = heads_of(k);
  args.v = heads_of(v);
  args.n_heads = q.size(1);
  args.head_dim = q.size(2);
  args.group = q.size(1) / k.size(1);
  args.scale = scale;
  args.causal = causal;
  args.lse_head_stride = q.size(0);
}

// Zeroes the rows of a contiguous [T, H, D] tensor that belong to no sequence.
void zero_padding(const Tensor& t, const Tensor& cu_seqlens) {
  const int32_t end = static_cast<const int32_t*>(cu_seqlens.const_data_ptr())[cu_seqlens.size(0) - 1];
  const size_t row_bytes = t.size(1) * t.size(2) * t.element_size();
  std::memset(static_cast<char*>(t.mutable_data_ptr()) + end * row_bytes, 0, (t.size(0) - end) * row_bytes);
}

template <class T>
void lse_of_padding(const Tensor& lse, const Tensor& cu_seqlens) {
  const int64_t end = static_cast<const int32_t*>(cu_seqlens.const_data_ptr())[cu_seqlens.size(0) - 1];
  T* values = static_cast<T*>(lse.mutable_data_ptr());
  for (int64_t head = 0; head < lse.size(0); ++head) {
    std::fill(values + head * lse.size(1) + end, values + (head + 1) * lse.size(1),
              -std::numeric_limits<T>::infinity());
  }
}

std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                            std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
                                            double scale, bool causal, std::optional<Tensor> tiles,
                                            std::vector<int64_t> tile_counts) {
  const int64_t batch = check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  q = rows_contiguous(q);
  k = rows_contiguous(k);
  v = rows_contiguous(v);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(1), q.size(0)}, compute_type_of(q));
  zero_padding(out, cu_seqlens_q);
  if (lse.scalar_type() == ScalarType::Double) {
    lse_of_padding<double>(lse, cu_seqlens_q);
  } else {
    lse_of_padding<float>(lse, cu_seqlens_q);
  }

  cpu::AttentionForward args;
  fill_common(args, q, k, v, scale, causal);
  args.out = mutable_heads_of(out);
  args.lse = lse.mutable_data_ptr();
  const cpu::AttentionKernels& kernels = cpu::kernels().attention;
  const auto kernel = kernels.forward[static_cast<int>(dtype_of(q, "q"))];
  const std::vector<AttentionItem> items =
      plan_attention(offsets_of(cu_seqlens_q), offsets_of(cu_seqlens_k), batch, k.size(1), kernels.row_tile);
  for_each_task(items.size(), [&](int64_t i) {
    if (items[i].n_rows > 0) kernel(args, items[i]);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor cu_seqlens_q, Tensor cu_seqlens_k, std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k,
    double scale, bool causal, std::optional<Tensor> tiles, std::vector<int64_t> tile_counts) {
  const int64_t batch = check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const auto like_q = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2) &&
                        t.scalar_type() == q.scalar_type() && t.is_cpu(),
                    name, " must have q's shape, dtype and device");
    return rows_contiguous(t);
  };
  const auto like_lse = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == q.size(1) && t.size(1) == q.size(0) &&
                        t.scalar_type() == compute_type_of(q) && t.is_cpu(),
                    name, " must have shape [Hq, Tq], q's device and dtype float32, or float64 for float64");
    return revit::contiguous(t);
  };
  grad_out = like_q(grad_out, "grad_out");
  out = like_q(out, "out");
  lse = like_lse(lse, "lse");
  if (grad_lse.has_value()) grad_lse = like_lse(*grad_lse, "grad_lse");
  q = rows_contiguous(q);
  k = rows_contiguous(k);
  v = rows_contiguous(v);
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensor grad_k = torch::stable::new_empty(k, k.sizes());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes());
  zero_padding(grad_q, cu_seqlens_q);
  zero_padding(grad_k, cu_seqlens_k);
  zero_padding(grad_v, cu_seqlens_k);

  cpu::AttentionBackward args;
  fill_common(args, q, k, v, scale, causal);
  args.grad_out = heads_of(grad_out);
  args.out = heads_of(out);
  args.lse = lse.const_data_ptr();
  args.grad_lse = grad_lse.has_value() ? grad_lse->const_data_ptr() : nullptr;
  args.grad_q = mutable_heads_of(grad_q);
  args.grad_k = mutable_heads_of(grad_k);
  args.grad_v = mutable_heads_of(grad_v);
  const auto kernel = cpu::kernels().attention.backward[static_cast<int>(dtype_of(q, "q"))];
  const std::vector<AttentionItem> items =
      plan_attention(offsets_of(cu_seqlens_q), offsets_of(cu_seqlens_k), batch, k.size(1), 0);
  for_each_task(items.size(), [&](int64_t i) { kernel(args, items[i]); });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&revit::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&revit::varlen_attention_backward));
}
