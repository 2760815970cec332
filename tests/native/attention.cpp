// Attention against a plain double loop, on buffers that end with the last element that a kernel may touch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "native_test.h"

namespace native {
namespace {

using revit::cpu::AttentionBackward;
using revit::cpu::AttentionForward;
using revit::cpu::AttentionItem;
using revit::cpu::AttentionKernels;

struct Case {
  int64_t n_queries, n_keys, dim, group;
  bool causal;
};

constexpr double kScale = 0.4;
constexpr int64_t kKvHeads = 2;

float fill_value(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23)) / static_cast<float>(1 << 22);
}

// An exact-size heap array, so that AddressSanitizer sees the first element beyond it.
struct Buffer {
  explicit Buffer(int64_t n) : size(n), data(new float[n]) {
    for (int64_t i = 0; i < n; ++i) data[i] = std::numeric_limits<float>::quiet_NaN();
  }
  void randomise(uint32_t seed) {
    for (int64_t i = 0; i < size; ++i) data[i] = fill_value(seed);
  }
  int64_t size;
  std::unique_ptr<float[]> data;
};

// Largest difference; infinity where a value is NaN.
double difference(const Buffer& ours, const std::vector<double>& truth) {
  double worst = 0;
  for (int64_t i = 0; i < ours.size; ++i) {
    const double d = std::abs(ours.data[i] - truth[i]);
    if (!(d <= worst)) worst = std::isnan(d) ? (ours.data[i] == truth[i] ? worst : INFINITY) : d;
  }
  return worst;
}

void check_case(const revit::cpu::Kernels& kernels, const Case& c) {
  const AttentionKernels& attention = kernels.attention;
  const int64_t heads = kKvHeads * c.group, q_row = heads * c.dim, k_row = kKvHeads * c.dim;
  Buffer q(c.n_queries * q_row), k(c.n_keys * k_row), v(c.n_keys * k_row), grad_out(q.size);
  Buffer out(q.size), lse(heads * c.n_queries), grad_lse(lse.size), dq(q.size), dk(k.size), dv(k.size);
  uint32_t seed = 1;
  for (Buffer* buffer : {&q, &k, &v, &grad_out, &grad_lse}) buffer->randomise(seed++);

  std::vector<double> out_truth(out.size), lse_truth(lse.size), dq_truth(dq.size), dk_truth(dk.size), dv_truth(dv.size);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < c.n_queries; ++i) {
      const int64_t at = i * q_row + h * c.dim, kv = h / c.group * c.dim;
      const int64_t visible =
          c.causal ? std::max<int64_t>(0, std::min(c.n_keys, i + 1 + c.n_keys - c.n_queries)) : c.n_keys;
      std::vector<double> p(visible), dp(visible);
      double sum = 0, delta = 0;
      for (int64_t j = 0; j < visible; ++j) {
        double s = 0;
        for (int64_t d = 0; d < c.dim; ++d) s += double(q.data[at + d]) * k.data[j * k_row + kv + d];
        sum += p[j] = std::exp(kScale * s);
      }
      lse_truth[h * c.n_queries + i] = std::log(sum);
      for (int64_t j = 0; j < visible; ++j) {
        p[j] /= sum;
        for (int64_t d = 0; d < c.dim; ++d) {
          out_truth[at + d] += p[j] * v.data[j * k_row + kv + d];
          dp[j] += double(grad_out.data[at + d]) * v.data[j * k_row + kv + d];
          dv_truth[j * k_row + kv + d] += p[j] * grad_out.data[at + d];
        }
        delta += p[j] * dp[j];
      }
      delta -= grad_lse.data[h * c.n_queries + i];
      for (int64_t j = 0; j < visible; ++j) {
        for (int64_t d = 0; d < c.dim; ++d) {
          const double ds = kScale * p[j] * (dp[j] - delta);
          dq_truth[at + d] += ds * k.data[j * k_row + kv + d];
          dk_truth[j * k_row + kv + d] += ds * q.data[at + d];
        }
      }
    }
  }

  AttentionForward forward = {};
  forward.q = {q.data.get(), q_row, c.dim};
  forward.k = {k.data.get(), k_row, c.dim};
  forward.v = {v.data.get(), k_row, c.dim};
  forward.n_heads = heads;
  forward.head_dim = c.dim;
  forward.group = c.group;
  forward.scale = kScale;
  forward.causal = c.causal;
  forward.lse_head_stride = c.n_queries;
  forward.out = {out.data.get(), q_row, c.dim};
  forward.lse = lse.data.get();
  AttentionBackward backward = {};
  static_cast<revit::cpu::AttentionArgs&>(backward) = forward;
  backward.grad_out = {grad_out.data.get(), q_row, c.dim};
  backward.out = {out.data.get(), q_row, c.dim};
  backward.lse = lse.data.get();
  backward.grad_lse = grad_lse.data.get();
  backward.grad_q = {dq.data.get(), q_row, c.dim};
  backward.grad_k = {dk.data.get(), k_row, c.dim};
  backward.grad_v = {dv.data.get(), k_row, c.dim};
  for (int64_t head = 0; head < kKvHeads; ++head) {
    for (int64_t first = 0; first < c.n_queries; first += attention.row_tile) {
      const int64_t rows = std::min(attention.row_tile, c.n_queries - first);
      attention.forward[0](forward, {0, c.n_queries, 0, c.n_keys, head, first, rows});
    }
    attention.backward[0](backward, {0, c.n_queries, 0, c.n_keys, head, 0, c.n_queries});
  }
  CHECK(difference(out, out_truth) < 1e-5);
  CHECK(difference(lse, lse_truth) < 1e-4);
  CHECK(difference(dq, dq_truth) < 1e-3);
  CHECK(difference(dk, dk_truth) < 1e-3);
  CHECK(difference(dv, dv_truth) < 1e-3);
}

}  // namespace

void test_attention(const revit::cpu::Kernels& kernels) {
  const Case cases[] = {{1, 1, 1, 1, false},   {7, 5, 7, 2, true},     {50, 50, 40, 1, false},
                        {53, 49, 33, 1, true}, {26, 0, 8, 1, false},   {0, 9, 8, 1, false},
                        {9, 3, 256, 1, true},  {3, 1025, 5, 1, false}, {60, 577, 3, 2, true}};
  for (const Case& c : cases) check_case(kernels, c);
}

}  // namespace native
