// One call of one kernel, whose instructions callgrind counts (see gate.py).
//
//   gate        lists the cases
//   gate CASE   runs the case, and prints the useful work of the call that is counted and the unit of that work
//
// Shapes and strides are those in which the ops call the kernels. The kernels' table is that of the instruction set
// REVIT_GATE_ISA, so that no other needs to be compiled.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/kernels.h"

// Callgrind counts while this function, which it knows by name, is on the stack. The barrier keeps the call from
// becoming a jump, after which it would not be.
extern "C" __attribute__((noinline)) void revit_gate_measured(const std::function<void()>& call) {
  call();
  asm volatile("" ::: "memory");
}

namespace {

using namespace revit::cpu;

const Kernels& counted = REVIT_GATE_ISA::kernels;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Owns what a case works on. Arrays lie on cache lines of their own, as tensors do.
class Arena {
 public:
  template <class T>
  T* zeros(int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    blocks_.emplace_back(::operator new(bytes, kAlign));
    std::memset(blocks_.back().get(), 0, bytes);
    return static_cast<T*>(blocks_.back().get());
  }

  // Numbers of [-scale, scale), the same in every run.
  float* random(int64_t n, float scale = 1) {
    float* out = zeros<float>(n);
    for (int64_t i = 0; i < n; ++i) out[i] = scale * next();
    return out;
  }

  // The same in bfloat16, cut off instead of rounded.
  uint16_t* random_bfloat16(int64_t n, float scale) {
    uint16_t* out = zeros<uint16_t>(n);
    for (int64_t i = 0; i < n; ++i) {
      const float value = scale * next();
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      out[i] = static_cast<uint16_t>(bits >> 16);
    }
    return out;
  }

  uint8_t* random_bytes(int64_t n) {
    uint8_t* out = zeros<uint8_t>(n);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(128 + 128 * next());
    return out;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlign); }
  };

  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 8) - (1 << 23)) / static_cast<float>(1 << 23);
  }

  std::vector<std::unique_ptr<void, Free>> blocks_;
  uint32_t state_ = 1;
};

struct Call {
  std::function<void()> run;
  int64_t work;
};

struct Case {
  std::string name;
  const char* unit;  // of Call::work
  std::function<Call(Arena&)> make;
};

struct Vit {
  int64_t n_channels, n_heads;  // head_dim is 64
  int64_t hidden;
  bool rotary = false;  // heads turn
  bool modern = false;  // RMSNorms, norms of the heads, and a gated MLP
};

constexpr Vit kDeitTiny = {192, 3, 768}, kDeitSmall = {384, 6, 1536};
// Without rotation it is DeiT-S. The other has as many multiply-adds: a gated MLP has three matrices.
constexpr Vit kDinov3Small = {384, 6, 1536, true}, kModernSmall = {384, 6, 1024, true, true};
constexpr int64_t kHeadDim = 64, kPatchDepth = 16 * 16 * 3;

// Whole blocks of rows, an odd number of cache lines apart, as the engine lays them out.
Rows rows(Arena& arena, int64_t n_rows, int64_t n_columns) {
  const int64_t stride = (divide_up(n_columns, 32) * 2 + 1) * 16, block = 2 * counted.linear.half_block;
  return {arena.random(divide_up(n_rows, block) * block * stride), stride};
}

PackedWeight packed_weight(Arena& arena, WeightType type, int64_t n_out, int64_t depth) {
  const int64_t panel = counted.linear.panel, n_panels = divide_up(n_out, panel);
  const int64_t n = n_panels * panel * (type == WeightType::kFloat32 ? depth : divide_up(depth, 2) * 2);
  const float scale = 1 / std::sqrt(static_cast<float>(depth));
  PackedWeight weight = {};
  weight.type = type;
  weight.panels = type == WeightType::kFloat32    ? static_cast<const void*>(arena.random(n, scale))
                  : type == WeightType::kBFloat16 ? static_cast<const void*>(arena.random_bfloat16(n, scale))
                                                  : static_cast<const void*>(arena.random_bytes(n));
  if (type == WeightType::kInt8) weight.scales = arena.random(n_panels * panel, scale / 127);
  weight.bias = arena.random(n_panels * panel);
  weight.depth = depth;
  weight.n_panels = n_panels;
  return weight;
}

TokenNorm token_norm(Arena& arena, int64_t n_channels, bool rms = false) {
  return {arena.random(n_channels), rms ? nullptr : arena.random(n_channels), 1e-6};
}

// Everything between two attentions. Useful work: the four matrix products.
Call block_tile(Arena& arena, const Vit& vit, WeightType type, int64_t n_rows) {
  const int64_t n_channels = vit.n_channels, width = vit.n_heads * kHeadDim, hidden = vit.hidden;
  const int64_t n_hidden = (vit.modern ? 2 : 1) * hidden;
  BlockWeights* block = arena.zeros<BlockWeights>(1);
  block->n_channels = n_channels;
  block->n_heads = vit.n_heads;
  block->head_dim = kHeadDim;
  block->hidden = hidden;
  block->activation = vit.modern ? Activation::kSilu : Activation::kGelu;
  block->gated_mlp = vit.modern;
  BlockTile tile = {};
  tile.block = tile.next = block;
  tile.attended = rows(arena, n_rows, width);
  tile.x = rows(arena, n_rows, n_channels);
  tile.length = arena.zeros<int32_t>(n_rows);
  tile.position = arena.zeros<int32_t>(n_rows);
  tile.n_rows = n_rows;
  block->proj = packed_weight(arena, type, n_channels, width);
  block->norm2 = token_norm(arena, n_channels, vit.modern);
  block->fc1 = packed_weight(arena, type, n_hidden, n_channels);
  block->fc2 = packed_weight(arena, type, n_channels, hidden);
  block->norm1 = token_norm(arena, n_channels, vit.modern);
  if (vit.modern) block->q_norm = block->k_norm = token_norm(arena, kHeadDim, true);
  if (vit.rotary) block->rotary = {arena.random(kHeadDim), 1};
  block->qkv = packed_weight(arena, type, 3 * width, n_channels);
  tile.end_panel = block->qkv.n_panels;
  tile.projected = rows(arena, n_rows, 3 * width);
  const auto kernel = counted.block.tile[static_cast<int>(type)];
  return {[=] { kernel(tile); }, 2 * n_rows * n_channels * (width + n_hidden + hidden + 3 * width)};
}

// Useful work: the matrix product.
Call embed_tile(Arena& arena, const Vit& vit, bool bytes, int64_t n_rows) {
  int32_t* position = arena.zeros<int32_t>(n_rows + 1);
  int64_t* token = arena.zeros<int64_t>(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) {
    token[i] = i + 1;  // behind a class token
    position[token[i]] = static_cast<int32_t>(i);
  }
  EmbedTile tile = {};
  tile.rows = bytes ? static_cast<const void*>(arena.random_bytes(n_rows * kPatchDepth))
                    : static_cast<const void*>(arena.random(n_rows * kPatchDepth));
  tile.dtype = DType::kFloat32;
  tile.bytes = bytes;
  tile.n_rows = n_rows;
  tile.embed = packed_weight(arena, WeightType::kFloat32, vit.n_channels, kPatchDepth);
  tile.n_channels = vit.n_channels;
  tile.table = arena.random(n_rows * vit.n_channels);
  tile.position = position;
  tile.token = token;
  tile.tokens = rows(arena, n_rows + 1, vit.n_channels);
  const auto kernel = counted.block.embed[0];
  return {[=] { kernel(tile); }, 2 * n_rows * kPatchDepth * vit.n_channels};
}

// Queries, keys and values side by side, as a block leaves them.
void set_attention(AttentionArgs& args, Arena& arena, const Vit& vit, int64_t n_tokens) {
  const int64_t width = vit.n_heads * kHeadDim;
  const Rows qkv = rows(arena, n_tokens, 3 * width);
  args.q = {qkv.data, qkv.stride, kHeadDim};
  args.k = {qkv.data + width, qkv.stride, kHeadDim};
  args.v = {qkv.data + 2 * width, qkv.stride, kHeadDim};
  args.n_heads = vit.n_heads;
  args.head_dim = kHeadDim;
  args.group = 1;
  args.scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
  args.lse_head_stride = n_tokens;
}

// All queries of the first head.
AttentionItem first_head(int64_t n_tokens) {
  AttentionItem item = {};
  item.n_queries = item.n_keys = item.n_rows = n_tokens;
  return item;
}

// Inference, one head. Useful work: the products of S and O.
Call attention_forward(Arena& arena, const Vit& vit, int64_t n_tokens) {
  AttentionForward args = {};
  set_attention(args, arena, vit, n_tokens);
  const Rows out = rows(arena, n_tokens, vit.n_heads * kHeadDim);
  args.out = {out.data, out.stride, kHeadDim};
  const AttentionItem item = first_head(n_tokens);
  const auto kernel = counted.attention.forward[0];
  return {[=] { kernel(args, item); }, 4 * n_tokens * n_tokens * kHeadDim};
}

// Useful work: the products of S, dP, dQ, dK and dV.
Call attention_backward(Arena& arena, const Vit& vit, int64_t n_tokens) {
  const int64_t width = vit.n_heads * kHeadDim;
  const auto gradient = [&] { return MutableHeads{arena.random(n_tokens * width), width, kHeadDim}; };
  const AttentionItem item = first_head(n_tokens);
  AttentionForward forward = {};
  set_attention(forward, arena, vit, n_tokens);
  forward.out = gradient();
  forward.lse = arena.zeros<float>(vit.n_heads * n_tokens);
  counted.attention.forward[0](forward, item);
  AttentionBackward args = {};
  static_cast<AttentionArgs&>(args) = forward;
  args.grad_out = {arena.random(n_tokens * width), width, kHeadDim};
  args.out = {forward.out.data, width, kHeadDim};
  args.lse = forward.lse;
  args.grad_q = gradient();
  args.grad_k = gradient();
  args.grad_v = gradient();
  const auto kernel = counted.attention.backward[0];
  return {[=] { kernel(args, item); }, 10 * n_tokens * n_tokens * kHeadDim};
}

// Useful work: the bytes of x, residual, sum and y.
Call layer_norm_forward(Arena& arena, bool rms, int64_t n_rows, int64_t n_channels) {
  LayerNormArgs args = {};
  args.x = arena.random(n_rows * n_channels);
  args.residual = arena.random(n_rows * n_channels);
  args.weight = arena.random(n_channels);
  args.bias = rms ? nullptr : arena.random(n_channels);
  args.y = arena.zeros<float>(n_rows * n_channels);
  args.sum = arena.zeros<float>(n_rows * n_channels);
  args.mean = arena.zeros<float>(n_rows);
  args.rstd = arena.zeros<float>(n_rows);
  args.scratch = arena.zeros<float>(n_channels);
  args.n_rows = n_rows;
  args.n_channels = n_channels;
  args.eps = 1e-6;
  const auto kernel = counted.layer_norm.forward[0];
  return {[=] { kernel(args); }, 4 * n_rows * n_channels * static_cast<int64_t>(sizeof(float))};
}

// The taps of bicubic interpolation, in number and place; all weigh the same, as their values cost nothing. With
// `even`, they start at even inputs.
ResizeAxis resize_axis(Arena& arena, int32_t n_in, int32_t n_out, bool even) {
  const double scale = static_cast<double>(n_in) / n_out, support = 2 * std::max(scale, 1.0);
  int32_t *first = arena.zeros<int32_t>(n_out), *n_taps = arena.zeros<int32_t>(n_out);
  ResizeAxis axis = {};
  for (int32_t i = 0; i < n_out; ++i) {
    const double center = (i + 0.5) * scale;
    first[i] = static_cast<int32_t>(std::max(center - support + 0.5, 0.0));
    const int32_t end = static_cast<int32_t>(std::min(center + support + 0.5, static_cast<double>(n_in)));
    if (even) first[i] -= first[i] % 2;
    n_taps[i] = end - first[i];
    axis.max_taps = std::max(axis.max_taps, n_taps[i]);
  }
  axis.first = first;
  axis.n_taps = n_taps;
  axis.pairs_stride = divide_up(axis.max_taps, 2);
  TapPair* pairs = arena.zeros<TapPair>(n_out * axis.pairs_stride);
  for (int32_t i = 0; i < n_out; ++i) {
    const int32_t weight = (1 << kWeightBits) / n_taps[i];
    for (int32_t t = 0; t < n_taps[i]; ++t) {
      TapPair& pair = pairs[i * axis.pairs_stride + t / 2];
      pair.high[t % 2] = static_cast<int16_t>(weight >> kLowBits);
      pair.low[t % 2] = static_cast<int16_t>(weight & ((1 << kLowBits) - 1));
    }
  }
  axis.pairs = pairs;
  return axis;
}

// A photograph to float32 patch rows. Useful work: the bytes of its pixels, and of the rows.
Call resize(Arena& arena, int32_t width, int32_t height, int32_t out_px) {
  const int64_t n_in = int64_t{3} * width * height, n_out = int64_t{3} * out_px * out_px;
  ResizeArgs args = {};
  args.image = arena.random_bytes(n_in);
  args.stride_y = 3 * width;
  args.stride_x = 3;
  args.stride_c = 1;
  args.height = height;
  args.width = width;
  args.out_width = out_px;
  args.patch_size = 16;
  args.horizontal = resize_axis(arena, width, out_px, true);
  args.vertical = resize_axis(arena, height, out_px, false);
  args.table = arena.random(3 * 256);
  args.element_bytes = sizeof(float);
  args.out = arena.zeros<float>(n_out);
  uint8_t* scratch = arena.zeros<uint8_t>(counted.resize.scratch_bytes(args));
  const auto kernel = counted.resize.rows;
  return {[=] { kernel(args, 0, out_px, scratch); }, n_in + n_out * args.element_bytes};
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const auto add = [&](std::string name, const char* unit, std::function<Call(Arena&)> make) {
    cases.push_back({std::move(name), unit, std::move(make)});
  };
  const auto add_block = [&](const char* name, const Vit& vit, WeightType type, int64_t n_rows) {
    static const char* const kTypes[kWeightTypes] = {"float32", "bfloat16", "int8"};
    add(std::string("block ") + name + " " + kTypes[static_cast<int>(type)] + " " + std::to_string(n_rows) + " rows",
        "FLOP", [=](Arena& arena) { return block_tile(arena, vit, type, n_rows); });
  };
  for (const int64_t n_rows : {72, 48}) {
    for (const WeightType type : {WeightType::kFloat32, WeightType::kBFloat16, WeightType::kInt8}) {
      add_block("deit-s", kDeitSmall, type, n_rows);
    }
  }
  add_block("deit-ti", kDeitTiny, WeightType::kFloat32, 72);
  add_block("dinov3-s", kDinov3Small, WeightType::kFloat32, 72);
  add_block("rotary, gated, rms", kModernSmall, WeightType::kFloat32, 72);
  for (const bool bytes : {false, true}) {
    add(std::string("embed deit-s ") + (bytes ? "uint8" : "float32") + " 72 rows", "FLOP",
        [=](Arena& arena) { return embed_tile(arena, kDeitSmall, bytes, 72); });
  }
  for (const int64_t n_tokens : {1025, 197, 101, 50}) {
    add("attention forward float32 " + std::to_string(n_tokens) + " tokens", "FLOP",
        [=](Arena& arena) { return attention_forward(arena, kDeitSmall, n_tokens); });
  }
  add("attention backward float32 101 tokens", "FLOP",
      [](Arena& arena) { return attention_backward(arena, kDeitSmall, 101); });
  add("layer norm residual float32 64 x 384", "byte",
      [](Arena& arena) { return layer_norm_forward(arena, false, 64, 384); });
  add("rms norm residual float32 64 x 384", "byte",
      [](Arena& arena) { return layer_norm_forward(arena, true, 64, 384); });
  add("resize 500 x 375 to 224 px", "byte", [](Arena& arena) { return resize(arena, 500, 375, 224); });
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : all_cases()) {
    if (argc == 1) std::printf("%s\n", c.name.c_str());
    if (argc != 2 || c.name != argv[1]) continue;
    Arena arena;
    const Call call = c.make(arena);
    call.run();  // the scratch memory that the kernels keep is there from now on, and the program is linked
    revit_gate_measured(call.run);
    std::printf("%" PRId64 " %s\n", call.work, c.unit);
    return 0;
  }
  if (argc == 1) return 0;
  std::fprintf(stderr, "no such case\n");
  return 2;
}
