// The descriptor of a ViT: the numbers that its forward pass needs beside the weights, in one float64 vector.
//
//   version, n_lengths, n_blocks, norm_pre.eps, norm.eps, patch_norm.eps,
//   and for each block: n_heads, head_dim, hidden, activation, gated_mlp, gated_attention, scale, and the eps of norm1,
//   norm2, q_norm, k_norm, out_norm and mlp_norm
//
// ViTWeights.descriptor in revit_fast/ops/vit.py writes it, and decode_descriptor reads it. A change of this layout
// needs a new version in both, and no change of the op's schema.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/linear.h"

namespace revit {

struct BlockDescriptor {
  int64_t n_heads, head_dim, hidden;
  cpu::Activation activation;
  bool gated_mlp, gated_attention;
  double scale;  // factor on the scores
  double norm1_eps, norm2_eps, q_norm_eps, k_norm_eps, out_norm_eps, mlp_norm_eps;
};

struct ViTDescriptor {
  int64_t n_lengths;
  double norm_pre_eps, norm_eps, patch_norm_eps;
  std::vector<BlockDescriptor> blocks;
};

// Reads one number after another; errors say which number is wrong.
class DescriptorReader {
 public:
  explicit DescriptorReader(const double* next) : next_(next) {}

  // The numbers that follow belong to this block.
  void enter_block(int64_t i) { place_ = "blocks[" + std::to_string(i) + "]."; }

  int64_t whole(const char* name, int64_t least, int64_t most) {
    const double value = *next_++;
    STD_TORCH_CHECK(
        value >= static_cast<double>(least) && value <= static_cast<double>(most) && value == std::floor(value),
        "descriptor: ", place_, name, " must be a whole number in [", least, ", ", most, "], got ", value);
    return static_cast<int64_t>(value);
  }

  double finite(const char* name) {
    const double value = *next_++;
    STD_TORCH_CHECK(std::isfinite(value), "descriptor: ", place_, name, " must be a finite number, got ", value);
    return value;
  }

  double not_negative(const char* name) {
    const double value = *next_++;
    STD_TORCH_CHECK(std::isfinite(value) && value >= 0, "descriptor: ", place_, name,
                    " must be finite and not negative, got ", value);
    return value;
  }

 private:
  const double* next_;
  std::string place_;  // comes before names in messages
};

inline ViTDescriptor decode_descriptor(const Tensor& descriptor) {
  constexpr int64_t kVersion = 2, kBeforeBlocks = 6, kPerBlock = 13;
  constexpr int64_t kMost = INT32_MAX;  // sizes computed from such numbers do not overflow
  STD_TORCH_CHECK(descriptor.is_cpu() && descriptor.scalar_type() == ScalarType::Double && descriptor.dim() == 1 &&
                      descriptor.is_contiguous(),
                  "descriptor must be a contiguous float64 CPU vector");
  const double* numbers = static_cast<const double*>(descriptor.const_data_ptr());
  const int64_t size = descriptor.size(0);
  // The version comes first, because another version may have another length.
  STD_TORCH_CHECK(size == 0 || numbers[0] == static_cast<double>(kVersion), "descriptor: version must be ", kVersion,
                  ", got ", numbers[0], "; write the descriptor with the release of revit_fast that runs it");
  STD_TORCH_CHECK(size >= kBeforeBlocks, "descriptor must have ", kBeforeBlocks, " numbers and ", kPerBlock,
                  " for each block, got ", size);
  DescriptorReader reader(numbers + 1);
  ViTDescriptor decoded = {};
  decoded.n_lengths = reader.whole("n_lengths", 1, kMost);
  const int64_t n_blocks = reader.whole("n_blocks", 0, kMost);
  STD_TORCH_CHECK(size == kBeforeBlocks + n_blocks * kPerBlock, "descriptor must have ", kBeforeBlocks, " numbers and ",
                  kPerBlock, " for each of its n_blocks = ", n_blocks, " blocks, got ", size);
  decoded.norm_pre_eps = reader.not_negative("norm_pre.eps");
  decoded.norm_eps = reader.not_negative("norm.eps");
  decoded.patch_norm_eps = reader.not_negative("patch_norm.eps");
  for (int64_t i = 0; i < n_blocks; ++i) {
    reader.enter_block(i);
    BlockDescriptor block = {};
    block.n_heads = reader.whole("n_heads", 1, kMost);
    block.head_dim = reader.whole("head_dim", 1, 256);
    block.hidden = reader.whole("hidden", 1, kMost);
    block.activation = static_cast<cpu::Activation>(reader.whole("activation", 0, cpu::kActivations - 1));
    block.gated_mlp = reader.whole("gated_mlp", 0, 1) == 1;
    block.gated_attention = reader.whole("gated_attention", 0, 1) == 1;
    block.scale = reader.finite("scale");
    block.norm1_eps = reader.not_negative("norm1.eps");
    block.norm2_eps = reader.not_negative("norm2.eps");
    block.q_norm_eps = reader.not_negative("q_norm.eps");
    block.k_norm_eps = reader.not_negative("k_norm.eps");
    block.out_norm_eps = reader.not_negative("out_norm.eps");
    block.mlp_norm_eps = reader.not_negative("mlp_norm.eps");
    decoded.blocks.push_back(block);
  }
  return decoded;
}

}  // namespace revit
