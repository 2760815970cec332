// The whole forward pass of a packed ViT except its head: from patch rows to normalised tokens.
//
// A block has two stages, each shared among all threads: attention, over (sequence, head) items; and everything between
// two attentions, over tiles of rows (cpu/block.h). A batch is computed in groups of sequences whose activations fit
// into the last-level cache, so that memory and time per token do not grow with the batch. Blocks may differ from one
// another in everything but their channels and the dtype of their weights (vit_descriptor.h).
#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "attention_plan.h"
#include "cpu/scratch.h"
#include "parallel.h"
#include "vit_descriptor.h"
#include "weights.h"

namespace revit {
namespace {

using cpu::Rows;

// Activations of a group of sequences, in bytes.
constexpr int64_t kGroupBytes = 24 << 20;
// Rows per thread that a group may have even if its activations exceed kGroupBytes.
constexpr int64_t kGroupRowsPerThread = 512;
// Workspace that a thread keeps from one call to the next.
constexpr size_t kKeptBytes = 128 << 20;
// From this many blocks of rows per thread on, every thread takes tiles of its own; fewer rows are also shared by
// columns.
constexpr int64_t kBlocksPerThread = 12;
constexpr int64_t kLeastTileBlocks = 3;
constexpr int64_t kNormTaskRows = 16;

constexpr int64_t kTensorsBeforeBlocks = 8, kTensorsPerBlock = 20;

int64_t n_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

using cpu::BlockWeights;

// Panels of each part of `qkv`.
int64_t panels_of_part(const BlockWeights& block) { return divide_up(block.width(), cpu::kernels().linear.panel); }

struct Model {
  int64_t n_channels;
  int64_t largest_width, largest_hidden;  // of all blocks
  int64_t most_parts;                     // of qkv: 3, or 4 with gates
  cpu::WeightType type;                   // of the blocks' weights, except for the first block's qkv
  cpu::PackedWeight embed;
  cpu::TokenNorm patch_norm, norm_pre, norm;
  std::vector<BlockWeights> blocks;
  const float* prefix;
  int64_t n_prefix;
  const float* table;
};

// Sequences [first, end) of a batch.
struct Group {
  int64_t first, end;
};

struct Batch {
  const char* rows;
  cpu::DType dtype;
  bool bytes;
  int64_t row_bytes;
  const int32_t* patches;  // cu_seqlens
  const int32_t* length_index;
  const int32_t* pos_offset;
};

// Writes the first row of each of n sequences, then the end of the last; sequence s has n_rows(s) rows.
template <class RowsOf>
void write_cu_seqlens(int64_t n, const RowsOf& n_rows, int32_t* cu_seqlens) {
  cu_seqlens[0] = 0;
  for (int64_t s = 0; s < n; ++s) cu_seqlens[s + 1] = cu_seqlens[s] + static_cast<int32_t>(n_rows(s));
}

// Cuts float32 matrices with spare rows, and index vectors, from one piece of memory.
class Workspace {
 public:
  explicit Workspace(char* memory) : next_(memory) {}

  template <class T>
  T* array(int64_t n) {
    T* array = reinterpret_cast<T*>(next_);
    used_ += bytes<T>(n);
    if (next_ != nullptr) next_ += bytes<T>(n);
    return array;
  }

  // Rows up to the next whole block. Their stride is an odd number of cache lines and holds whole panels.
  Rows rows(int64_t n_rows, int64_t n_columns) {
    const int64_t stride = (divide_up(n_columns, 32) * 2 + 1) * 16;
    return {array<float>(divide_up(n_rows, kSpareRows) * kSpareRows * stride), stride};
  }

  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kSpareRows = 12;

  template <class T>
  static int64_t bytes(int64_t n) {
    return divide_up(n * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }

  char* next_;
  int64_t used_ = 0;
};

// The arrays that a group's stages work on. They are constructed twice: first to learn the size, then in the memory.
struct Activations {
  Rows x, qkv, attended, pooled, pooled_attended, pooled_queries, normed, hidden;
  int32_t *cu_seqlens, *pooled_cu_seqlens, *length, *pooled_length, *position;
  int64_t *token, *pooled_token;

  Activations(Workspace& space, const Model& model, int64_t n_sequences, int64_t n_patches, int64_t n_pooled_rows,
              int64_t few_rows) {
    const int64_t n_rows = n_patches + n_sequences * model.n_prefix;
    const int64_t panel = cpu::kernels().linear.panel, width = divide_up(model.largest_width, panel) * panel;
    x = space.rows(n_rows, model.n_channels);
    qkv = space.rows(n_rows, model.most_parts * width);
    attended = space.rows(n_rows, width);
    pooled = space.rows(n_pooled_rows, model.n_channels);
    pooled_attended = space.rows(n_pooled_rows, width);
    pooled_queries = space.rows(n_pooled_rows, (model.most_parts - 2) * width);
    const int64_t shared_rows = std::min(n_rows, few_rows);
    normed = space.rows(shared_rows, model.n_channels);
    hidden = space.rows(shared_rows, model.largest_hidden);
    cu_seqlens = space.array<int32_t>(n_sequences + 1);
    pooled_cu_seqlens = space.array<int32_t>(n_sequences + 1);
    length = space.array<int32_t>(n_rows);
    pooled_length = space.array<int32_t>(n_pooled_rows);
    position = space.array<int32_t>(n_rows);
    token = space.array<int64_t>(n_patches);
    pooled_token = space.array<int64_t>(n_pooled_rows);
  }
};

// Stages over rows, shared among threads. Rows are cut at whole blocks, so that no tile writes rows of its neighbour.
class RowStages {
 public:
  RowStages() : kernels_(cpu::kernels()) {}

  int64_t block_rows() const { return 2 * kernels_.linear.half_block; }
  // Below this number of rows there are too few tiles to give every thread its own.
  int64_t few_rows() const { return kBlocksPerThread * n_threads() * block_rows(); }

  void norm(cpu::NormTile whole) const {
    for_each_task(divide_up(whole.n_rows, kNormTaskRows), [&](int64_t task) {
      const int64_t row = task * kNormTaskRows;
      cpu::NormTile tile = whole;
      tile.x = whole.x.from(row);
      tile.y = whole.y.from(row);
      tile.length += row;
      tile.n_rows = std::min(kNormTaskRows, whole.n_rows - row);
      kernels_.block.norm(tile);
    });
  }

  // Computes all rows of `whole`, in tiles; its weights have one type. `normed` and `hidden` are used if there are few
  // rows.
  void block(const cpu::BlockTile& whole, const Rows& normed, const Rows& hidden) const {
    if (whole.n_rows < few_rows()) return block_by_columns(whole, normed, hidden);
    const bool second = whole.attended.data != nullptr;
    const int type = static_cast<int>(second ? whole.block->proj.type : whole.next->qkv.type);
    const std::vector<int64_t> begins =
        tile_begins(whole.n_rows, kernels_.block.max_rows[type](second ? *whole.block : *whole.next));
    for_each_task(static_cast<int64_t>(begins.size()) - 1, [&](int64_t task) {
      kernels_.block.tile[type](whole.part(begins[task], begins[task + 1] - begins[task]));
    });
  }

 private:
  // Tall tiles come first, then smaller and smaller ones, so that all threads finish together.
  std::vector<int64_t> tile_begins(int64_t n_rows, int64_t max_rows) const {
    const int64_t unit = block_rows(), threads = n_threads(), most = max_rows / unit;
    std::vector<int64_t> begins = {0};
    for (int64_t left = divide_up(n_rows, unit); left > 0;) {
      const int64_t fair = threads == 1 ? most : divide_up(left, 2 * threads);
      const int64_t blocks = std::min(left, std::max(kLeastTileBlocks, std::min(most, fair)));
      left -= blocks;
      begins.push_back(left == 0 ? n_rows : begins.back() + blocks * unit);
    }
    return begins;
  }

  // Computes one layer after another, each shared by rows and columns, with the same sums in the same order.
  void block_by_columns(const cpu::BlockTile& whole, const Rows& normed, const Rows& hidden) const {
    const auto linear = [&](const cpu::PackedWeight& weight, const Rows& in, const Rows& out, cpu::Finish finish) {
      const cpu::Activation activation = whole.block != nullptr ? whole.block->activation : cpu::Activation::kNone;
      return cpu::LinearTile{in.data,         in.stride, whole.n_rows, weight,   0,
                             weight.n_panels, finish,    activation,   out.data, out.stride};
    };
    const auto norm_of = [&](const Rows& in, const Rows& out, const cpu::TokenNorm& parameters, int64_t n) {
      norm({in, out, whole.length, whole.n_rows, parameters, n});
    };
    const auto for_parts = [&](void (*kernel)(const cpu::BlockTile&)) {
      for_each_task(divide_up(whole.n_rows, kNormTaskRows), [&](int64_t task) {
        const int64_t row = task * kNormTaskRows;
        kernel(whole.part(row, std::min(kNormTaskRows, whole.n_rows - row)));
      });
    };
    if (whole.attended.data != nullptr) {
      const BlockWeights& block = *whole.block;
      if (block.finishes_attended()) for_parts(kernels_.block.finish_attended);
      share_linear(linear(block.proj, whole.attended, whole.x, cpu::Finish::kAdd));
      norm_of(whole.x, normed, block.norm2, block.n_channels);
      cpu::LinearTile fc1 = linear(block.fc1, normed, hidden, cpu::Finish::kActivate);
      fc1.end_panel = divide_up(block.hidden, kernels_.linear.panel);
      share_linear(fc1);
      if (block.gated_mlp) {
        fc1.first_panel = fc1.end_panel;
        fc1.end_panel *= 2;
        fc1.finish = cpu::Finish::kMultiply;
        share_linear(fc1);
      }
      if (block.mlp_norm.weight != nullptr) norm_of(hidden, hidden, block.mlp_norm, block.hidden);
      share_linear(linear(block.fc2, hidden, whole.x, cpu::Finish::kAdd));
    }
    if (whole.projected.data != nullptr) {
      norm_of(whole.x, normed, whole.next->norm1, whole.next->n_channels);
      cpu::LinearTile next = linear(whole.next->qkv, normed, whole.projected, cpu::Finish::kStore);
      next.first_panel = whole.first_panel;
      next.end_panel = whole.end_panel;
      share_linear(next);
      if (whole.next->finishes_heads()) for_parts(kernels_.block.finish_heads);
    }
  }

  const cpu::Kernels& kernels_;
};

class Forward {
 public:
  Forward(const Model& model, const Batch& batch, int64_t n_pooled, float* out)
      : model_(model), batch_(batch), n_pooled_(n_pooled), out_(out) {}

  void run(const Group& group, cpu::Scratch& memory) {
    const int64_t n_sequences = group.end - group.first;
    const int64_t n_patches = batch_.patches[group.end] - batch_.patches[group.first];
    const int64_t n_rows = n_patches + n_sequences * model_.n_prefix, n_pooled_rows = n_sequences * n_pooled_;
    const auto lay_out = [&](Workspace& space) {
      return Activations(space, model_, n_sequences, n_patches, n_pooled_rows, stages_.few_rows());
    };
    Workspace sizing(nullptr);
    lay_out(sizing);
    Workspace space(memory.reserve(static_cast<size_t>(sizing.used())));
    const Activations at = lay_out(space);
    index(group, at);
    embed(group, at, n_patches);
    if (model_.norm_pre.weight != nullptr) norm(at.x, at.x, at.length, n_rows, model_.norm_pre);

    const size_t depth = model_.blocks.size();
    const bool pools = n_pooled_ > 0;
    std::vector<cpu::AttentionItem> items;
    int64_t planned_heads = 0;
    project(at, n_rows, 0, pools && depth == 1);
    for (size_t i = 0; i < depth; ++i) {
      const BlockWeights& block = model_.blocks[i];
      const bool last = i + 1 == depth;
      if (last && pools) break;
      if (block.n_heads != planned_heads) {
        items = plan(at.cu_seqlens, at.cu_seqlens, n_sequences, block.n_heads);
        planned_heads = block.n_heads;
      }
      attend(block, at.qkv, at.attended, at, items);
      cpu::BlockTile tile = second_part(block, at.attended, at.qkv, at.x, at.length, n_rows);
      if (!last) add_projection(&tile, at, i + 1, pools && i + 2 == depth);
      stages_.block(tile, at.normed, at.hidden);
    }
    float* out = out_ + out_row(group) * model_.n_channels;
    if (!pools) return finish(at.x, at.length, n_rows, out);
    gather(at, n_pooled_rows);
    if (depth > 0) last_block(at, n_sequences, n_pooled_rows);
    finish(at.pooled, at.pooled_length, n_pooled_rows, out);
  }

 private:
  int64_t out_row(const Group& group) const {
    if (n_pooled_ > 0) return group.first * n_pooled_;
    return batch_.patches[group.first] + group.first * model_.n_prefix;
  }

  // Writes offsets and lengths of the group's tokens, the rows for its patches, and its prefix tokens.
  void index(const Group& group, const Activations& at) const {
    const int64_t begin = batch_.patches[group.first], n_prefix = model_.n_prefix;
    const size_t row_bytes = model_.n_channels * sizeof(float);
    const auto n_patches = [&](int64_t s) {
      return batch_.patches[group.first + s + 1] - batch_.patches[group.first + s];
    };
    const int64_t n_sequences = group.end - group.first;
    write_cu_seqlens(n_sequences, [&](int64_t s) { return n_prefix + n_patches(s); }, at.cu_seqlens);
    write_cu_seqlens(n_sequences, [&](int64_t) { return n_pooled_; }, at.pooled_cu_seqlens);
    for (int64_t s = 0; s < n_sequences; ++s) {
      const int64_t b = group.first + s, n = n_patches(s), patch = batch_.patches[b] - begin;
      const int64_t row = at.cu_seqlens[s], pooled = at.pooled_cu_seqlens[s];
      for (int64_t i = 0; i < n_prefix; ++i) {
        std::memcpy(at.x.from(row + i).data, model_.prefix + i * model_.n_channels, row_bytes);
      }
      std::fill_n(at.length + row, n_prefix + n, batch_.length_index[b]);
      std::iota(at.token + patch, at.token + patch + n, row + n_prefix);
      std::fill_n(at.position + row, n_prefix, -1);
      std::iota(at.position + row + n_prefix, at.position + row + n_prefix + n, batch_.pos_offset[b]);
      std::fill_n(at.pooled_length + pooled, n_pooled_, batch_.length_index[b]);
      std::iota(at.pooled_token + pooled, at.pooled_token + pooled + n_pooled_, row);
    }
  }

  void embed(const Group& group, const Activations& at, int64_t n_patches) const {
    const cpu::BlockKernels& kernels = cpu::kernels().block;
    const int64_t unit = stages_.block_rows(), most = kernels.max_embed_rows(model_.embed.depth);
    const int64_t fair = divide_up(divide_up(n_patches, 4 * n_threads()), unit) * unit;
    const int64_t tile_rows = std::max(unit, std::min(most, fair));
    const char* rows = batch_.rows + batch_.patches[group.first] * batch_.row_bytes;
    for_each_task(divide_up(n_patches, tile_rows), [&](int64_t task) {
      const int64_t row = task * tile_rows;
      kernels.embed[static_cast<int>(model_.embed.type)]({rows + row * batch_.row_bytes, batch_.dtype, batch_.bytes,
                                                          std::min(tile_rows, n_patches - row), model_.embed,
                                                          model_.patch_norm, model_.n_channels, model_.table, at.length,
                                                          at.position, at.token + row, at.x});
    });
  }

  void norm(const Rows& x, const Rows& y, const int32_t* length, int64_t n_rows, const cpu::TokenNorm& norm) const {
    stages_.norm({x, y, length, n_rows, norm, model_.n_channels});
  }

  // `queries` are the rows with the queries, behind which the gates are.
  cpu::BlockTile second_part(const BlockWeights& block, const Rows& attended, const Rows& queries, const Rows& x,
                             const int32_t* length, int64_t n_rows) const {
    cpu::BlockTile tile = {};
    tile.block = &block;
    tile.attended = attended;
    tile.gates = {queries.data + panels_of_part(block) * cpu::kernels().linear.panel, queries.stride};
    tile.x = x;
    tile.length = length;
    tile.n_rows = n_rows;
    return tile;
  }

  // Adds the first part of block i; with `keys_only` keys and values alone, because only pooled tokens need the others.
  void add_projection(cpu::BlockTile* tile, const Activations& at, size_t i, bool keys_only) const {
    const BlockWeights& block = model_.blocks[i];
    const int64_t panels = panels_of_part(block), parts = block.parts_before_keys();
    tile->position = at.position;
    tile->next = &block;
    tile->first_panel = keys_only ? parts * panels : 0;
    tile->end_panel = (parts + 2) * panels;
    tile->projected = at.qkv;
    tile->projected.data += tile->first_panel * cpu::kernels().linear.panel;
  }

  void project(const Activations& at, int64_t n_rows, size_t i, bool keys_only) const {
    if (i >= model_.blocks.size()) return;
    cpu::BlockTile tile = {};
    tile.x = at.x;
    tile.length = at.length;
    tile.n_rows = n_rows;
    add_projection(&tile, at, i, keys_only);
    stages_.block(tile, at.normed, at.hidden);
  }

  std::vector<cpu::AttentionItem> plan(const int32_t* queries, const int32_t* keys, int64_t n_sequences,
                                       int64_t n_heads) const {
    return plan_attention(queries, keys, n_sequences, n_heads, cpu::kernels().attention.row_tile);
  }

  void attend(const BlockWeights& block, const Rows& queries, const Rows& out, const Activations& at,
              const std::vector<cpu::AttentionItem>& items) const {
    const int64_t width = panels_of_part(block) * cpu::kernels().linear.panel, parts = block.parts_before_keys();
    cpu::AttentionForward args;
    args.q = {queries.data, queries.stride, block.head_dim};
    args.k = {at.qkv.data + parts * width, at.qkv.stride, block.head_dim};
    args.v = {at.qkv.data + (parts + 1) * width, at.qkv.stride, block.head_dim};
    args.n_heads = block.n_heads;
    args.head_dim = block.head_dim;
    args.group = 1;
    args.scale = block.scale;
    args.causal = false;
    args.lse_head_stride = 0;
    args.out = {out.data, out.stride, block.head_dim};
    args.lse = nullptr;
    const cpu::AttentionKernels& kernels = cpu::kernels().attention;
    const auto kernel = model_.type == cpu::WeightType::kFloat32
                            ? kernels.forward[static_cast<int>(cpu::DType::kFloat32)]
                            : kernels.forward_rounded;
    for_each_task(static_cast<int64_t>(items.size()), [&](int64_t i) {
      if (items[i].n_rows > 0) kernel(args, items[i]);
    });
  }

  void gather(const Activations& at, int64_t n_pooled_rows) const {
    for (int64_t i = 0; i < n_pooled_rows; ++i) {
      std::memcpy(at.pooled.from(i).data, at.x.from(at.pooled_token[i]).data, model_.n_channels * sizeof(float));
    }
  }

  // The last block if only pooled tokens are read; its keys and values are already computed.
  void last_block(const Activations& at, int64_t n_sequences, int64_t n_pooled_rows) const {
    const BlockWeights& block = model_.blocks.back();
    cpu::BlockTile queries = {};  // pooled tokens have no position: they do not turn
    queries.x = at.pooled;
    queries.length = at.pooled_length;
    queries.n_rows = n_pooled_rows;
    queries.next = &block;
    queries.end_panel = block.parts_before_keys() * panels_of_part(block);
    queries.projected = at.pooled_queries;
    stages_.block(queries, at.normed, at.hidden);
    attend(block, at.pooled_queries, at.pooled_attended, at,
           plan(at.pooled_cu_seqlens, at.cu_seqlens, n_sequences, block.n_heads));
    stages_.block(second_part(block, at.pooled_attended, at.pooled_queries, at.pooled, at.pooled_length, n_pooled_rows),
                  at.normed, at.hidden);
  }

  void finish(const Rows& x, const int32_t* length, int64_t n_rows, float* out) const {
    const int64_t n_channels = model_.n_channels;
    if (model_.norm.weight != nullptr) return norm(x, {out, n_channels}, length, n_rows, model_.norm);
    for (int64_t i = 0; i < n_rows; ++i) {
      std::memcpy(out + i * n_channels, x.from(i).data, n_channels * sizeof(float));
    }
  }

  const Model& model_;
  const Batch& batch_;
  int64_t n_pooled_;
  float* out_;
  RowStages stages_;
};

// Groups of whole sequences, of about equal size and as few as the size of their activations allows.
std::vector<Group> groups_of(const int32_t* patches, int64_t n_sequences, int64_t n_prefix, int64_t row_bytes) {
  const int64_t total = patches[n_sequences] + n_sequences * n_prefix;
  const int64_t most = std::max(kGroupBytes / row_bytes, kGroupRowsPerThread * n_threads());
  const int64_t target = divide_up(total, std::max<int64_t>(1, divide_up(total, most)));
  std::vector<Group> groups;
  for (int64_t b = 0; b < n_sequences;) {
    const int64_t first = b;
    int64_t rows = 0;
    do {
      rows += patches[b + 1] - patches[b] + n_prefix;
      ++b;
    } while (b < n_sequences && rows < target);
    groups.push_back({first, b});
  }
  return groups;
}

// An empty weight stands for no norm, an empty bias for RMSNorm.
cpu::TokenNorm token_norm(const Tensor* affine, double eps, int64_t n_rows, int64_t n_columns) {
  if (affine[0].numel() == 0) return {nullptr, nullptr, eps};
  const auto data_of = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.is_contiguous() &&
                        t.size(0) == n_rows && t.size(1) == n_columns,
                    "norm parameters must be contiguous float32 CPU tensors [", n_rows, ", ", n_columns, "]");
    return static_cast<const float*>(t.const_data_ptr());
  };
  return {data_of(affine[0]), affine[1].numel() == 0 ? nullptr : data_of(affine[1]), eps};
}

const float* float_matrix(const Tensor& t, int64_t n_columns, const char* name) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.is_contiguous() && t.size(1) == n_columns,
      name, " must be a contiguous float32 CPU tensor [N, ", n_columns, "]");
  return static_cast<const float*>(t.const_data_ptr());
}

BlockWeights block_of(const Tensor* weights, const BlockDescriptor& d, int64_t n_lengths, int64_t n_channels) {
  const int64_t panel = cpu::kernels().linear.panel, width = d.n_heads * d.head_dim;
  const auto norm = [&](int64_t i, double eps, int64_t n_rows, int64_t n_columns) {
    return token_norm(weights + 2 * i, eps, n_rows, n_columns);
  };
  const auto linear = [&](int64_t i, int64_t n_parts, int64_t n_out, int64_t depth, const char* name) {
    const int64_t whole = n_parts > 1 ? n_parts * divide_up(n_out, panel) * panel : n_out;
    return packed_weight(weights[2 * i], weights[2 * i + 1], whole, depth, name);
  };
  BlockWeights block = {};
  block.n_channels = n_channels;
  block.n_heads = d.n_heads;
  block.head_dim = d.head_dim;
  block.hidden = d.hidden;
  block.activation = d.activation;
  block.gated_mlp = d.gated_mlp;
  block.gated_attention = d.gated_attention;
  block.scale = d.scale;
  block.norm1 = norm(0, d.norm1_eps, n_lengths, n_channels);
  block.qkv = linear(1, block.parts_before_keys() + 2, width, n_channels, "qkv");
  block.proj = linear(2, 1, n_channels, width, "proj");
  block.norm2 = norm(3, d.norm2_eps, n_lengths, n_channels);
  block.fc1 = linear(4, d.gated_mlp ? 2 : 1, d.hidden, n_channels, "fc1");
  block.fc2 = linear(5, 1, n_channels, d.hidden, "fc2");
  block.q_norm = norm(6, d.q_norm_eps, 1, d.head_dim);
  block.k_norm = norm(7, d.k_norm_eps, 1, d.head_dim);
  block.out_norm = norm(8, d.out_norm_eps, n_lengths, width);
  block.mlp_norm = norm(9, d.mlp_norm_eps, n_lengths, d.hidden);
  STD_TORCH_CHECK(block.norm1.weight != nullptr && block.norm2.weight != nullptr, "a block needs both its norms");
  STD_TORCH_CHECK((block.q_norm.weight == nullptr) == (block.k_norm.weight == nullptr),
                  "a block has norms of both queries and keys, or of neither");
  return block;
}

// Gives every block its table of `rope`, float32 [1 or n_blocks, R, 1 or n_heads, 2, head_dim / 2].
void set_rotary(Model& model, const Tensor& rope, int64_t n_positions) {
  const int64_t n_blocks = static_cast<int64_t>(model.blocks.size());
  STD_TORCH_CHECK(rope.is_cpu() && rope.scalar_type() == ScalarType::Float && rope.dim() == 5 && rope.is_contiguous() &&
                      (rope.size(0) == 1 || rope.size(0) == n_blocks) && rope.size(1) == n_positions &&
                      rope.size(3) == 2,
                  "rope must be a contiguous float32 CPU tensor [1 or ", n_blocks, ", ", n_positions,
                  ", 1 or heads, 2, head_dim / 2]: a row for every row of pos_table");
  const float* table = static_cast<const float*>(rope.const_data_ptr());
  const int64_t n_tables = rope.size(2), size = n_positions * n_tables * 2 * rope.size(4);
  for (BlockWeights& block : model.blocks) {
    STD_TORCH_CHECK((n_tables == 1 || n_tables == block.n_heads) && 2 * rope.size(4) == block.head_dim,
                    "rope has tables for ", n_tables, " heads of ", 2 * rope.size(4), " channels; a block has ",
                    block.n_heads, " heads of ", block.head_dim);
    block.rotary = {table, n_tables};
    if (rope.size(0) > 1) table += size;
  }
}

Model model_of(const std::vector<Tensor>& weights, const ViTDescriptor& descriptor, int64_t n_channels,
               int64_t depth_of_rows) {
  const int64_t n_blocks = static_cast<int64_t>(descriptor.blocks.size()), n_lengths = descriptor.n_lengths;
  STD_TORCH_CHECK(n_channels >= 1, "prefix must have at least one channel");
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == kTensorsBeforeBlocks + n_blocks * kTensorsPerBlock,
                  "weights must be ", kTensorsBeforeBlocks, " tensors and ", kTensorsPerBlock,
                  " for each of the descriptor's ", n_blocks, " blocks, got ", weights.size());
  Model model = {};
  model.n_channels = n_channels;
  model.embed = packed_weight(weights[0], weights[1], n_channels, depth_of_rows, "embed");
  STD_TORCH_CHECK(model.embed.type != cpu::WeightType::kInt8, "embed must not be int8; pack it in float32");
  model.norm_pre = token_norm(&weights[2], descriptor.norm_pre_eps, n_lengths, n_channels);
  model.norm = token_norm(&weights[4], descriptor.norm_eps, n_lengths, n_channels);
  model.patch_norm = token_norm(&weights[6], descriptor.patch_norm_eps, n_lengths, n_channels);
  model.most_parts = 3;
  const Tensor* of_block = weights.data() + kTensorsBeforeBlocks;
  for (const BlockDescriptor& d : descriptor.blocks) {
    model.blocks.push_back(block_of(of_block, d, n_lengths, n_channels));
    of_block += kTensorsPerBlock;
    const BlockWeights& block = model.blocks.back();
    model.type = model.blocks[0].proj.type;
    const bool first = model.blocks.size() == 1;  // its qkv is a stage of its own, so it may have another type
    for (const cpu::PackedWeight* weight : {first ? &block.proj : &block.qkv, &block.proj, &block.fc1, &block.fc2}) {
      STD_TORCH_CHECK(weight->type == model.type,
                      "the weights of all blocks must have one dtype, except for the first block's qkv");
    }
    model.largest_width = std::max(model.largest_width, block.width());
    model.largest_hidden = std::max(model.largest_hidden, block.hidden);
    model.most_parts = std::max(model.most_parts, block.parts_before_keys() + 2);
  }
  return model;
}

Tensor vit_forward(const Tensor& rows_in, const Tensor& cu_seqlens, const Tensor& length_index,
                   const Tensor& pos_offset, const Tensor& pos_table, const Tensor& prefix, std::vector<Tensor> weights,
                   const Tensor& descriptor_in, int64_t n_pooled, const std::optional<Tensor>& rope) {
  const bool bytes = rows_in.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(rows_in.is_cpu() && rows_in.dim() == 2 && (bytes || is_floating(rows_in)),
                  "rows must be a floating or uint8 CPU tensor [Tp, P*P*3]");
  STD_TORCH_CHECK(prefix.dim() == 2 && n_pooled >= 0 && n_pooled <= prefix.size(0),
                  "n_pooled must be in [0, n_prefix = ", prefix.dim() == 2 ? prefix.size(0) : -1, "], got ", n_pooled);
  const int64_t n_channels = prefix.size(1), n_prefix = prefix.size(0);
  const int64_t n_sequences = check_cu_seqlens(cu_seqlens, rows_in.size(0), "cu_seqlens");
  const int32_t* patches = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  STD_TORCH_CHECK(patches[n_sequences] == rows_in.size(0), "rows must end with the last sequence: cu_seqlens ends at ",
                  patches[n_sequences], ", rows has ", rows_in.size(0));
  const ViTDescriptor descriptor = decode_descriptor(descriptor_in);
  check_length_index(length_index, n_sequences, descriptor.n_lengths);
  Model model = model_of(weights, descriptor, n_channels, rows_in.size(1));
  model.prefix = float_matrix(prefix, n_channels, "prefix");
  model.n_prefix = n_prefix;
  model.table = float_matrix(pos_table, n_channels, "pos_table");
  if (rope) set_rotary(model, *rope, pos_table.size(0));

  const Tensor rows = revit::contiguous(rows_in);
  Batch batch = {static_cast<const char*>(rows.const_data_ptr()),
                 bytes ? cpu::DType::kFloat32 : dtype_of(rows, "rows"),
                 bytes,
                 rows.size(1) * static_cast<int64_t>(rows.element_size()),
                 patches,
                 static_cast<const int32_t*>(length_index.const_data_ptr()),
                 static_cast<const int32_t*>(pos_offset.const_data_ptr())};
  check_pos_offset(pos_offset, patches, n_sequences, pos_table.size(0));

  const int64_t n_out = n_pooled > 0 ? n_sequences * n_pooled : patches[n_sequences] + n_sequences * n_prefix;
  Tensor out = torch::stable::new_empty(pos_table, {n_out, n_channels});
  static thread_local cpu::Scratch memory;
  Forward forward(model, batch, n_pooled, static_cast<float*>(out.mutable_data_ptr()));
  const int64_t row_bytes =
      (2 * n_channels + (model.most_parts + 1) * model.largest_width) * static_cast<int64_t>(sizeof(float));
  for (const Group& group : groups_of(patches, n_sequences, n_prefix, row_bytes)) forward.run(group, memory);
  memory.shrink(kKeptBytes);
  return out;
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_IMPL(revit_fast, CPU, m) { m.impl("vit_forward", TORCH_BOX(&revit::vit_forward)); }
