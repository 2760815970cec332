// A transformer block on a tile of rows (see block.h).
//
// Every tile reads all weights of a block once, while the tile's own activations stay in the L2 cache. So tiles are as
// tall as that cache allows. The MLP runs in chunks of hidden columns, which are the chains of its second layer: its
// sums grow chunk by chunk, in the order in which one product over the whole hidden row would add them. With int8
// weights a hidden row is rounded to integers chunk by chunk, because every chain has its own scale (see
// quantize.inl.h). A norm of the hidden row needs all of it: then there is one chunk.

// Activations of a tile, in bytes: as much as the L2 cache (512 KiB on Zen 3) holds beside the weights that are read.
inline constexpr int64_t kTileBytes = 320 << 10;

// Sums of a tile are kept in whole panels.
REVIT_INLINE int64_t whole_panels(int64_t n) { return round_up(n, kLinearPanel); }

// Floats of one row of a tile in each array.
struct RowFloats {
  int64_t normed, hidden, sums, rounded, rounded_hidden;
};

// Hidden columns that are computed at a time.
template <class W>
REVIT_INLINE int64_t hidden_chunk(const BlockWeights& block) {
  return block.mlp_norm.weight != nullptr ? block.hidden : chain_of<W>(block.hidden);
}

template <class W>
RowFloats row_floats(const BlockWeights& block) {
  const int64_t chunk = hidden_chunk<W>(block), n_channels = block.n_channels;
  return {odd_lines(n_channels), odd_lines(whole_panels(chunk)), whole_panels(n_channels),
          std::max(factors_size<W>(n_channels), factors_size<W>(block.width())), factors_size<W>(chunk)};
}

template <class W>
int64_t max_block_rows(const BlockWeights& block) {
  const RowFloats floats = row_floats<W>(block);
  const int64_t all = floats.normed + floats.hidden + floats.sums + floats.rounded + floats.rounded_hidden;
  const int64_t rows = kTileBytes / (all * static_cast<int64_t>(sizeof(float)));
  constexpr int64_t unit = kTiles<W> ? 96 : kLinearRows;  // whole blocks of this type and of floats
  return std::max<int64_t>(rows / unit, kTiles<W> ? 1 : 2) * unit;
}

inline int64_t max_embed_rows(int64_t depth) {
  const int64_t rows = kTileBytes / (odd_lines(depth) * static_cast<int64_t>(sizeof(float)));
  return std::max<int64_t>(rows / kLinearRows, 2) * kLinearRows;
}

template <Norm kNorm>
REVIT_INLINE void norm_row_of(const float* x, const TokenNorm& norm, int64_t length, float* y, int64_t n_channels) {
  const float sum = RowSum<float, Sum::kNone, kNorm>{x, nullptr, nullptr, nullptr}(n_channels);
  const auto statistics = row_statistics<kNorm>(x, sum, static_cast<float>(norm.eps), n_channels);
  const int64_t parameters = length * n_channels;
  const float* bias = kNorm == Norm::kLayer ? norm.bias + parameters : nullptr;
  row_write<kNorm>(x, norm.weight + parameters, bias, statistics, y, n_channels);
}

// y = norm(x), which may be the same row.
void norm_row(const float* x, const TokenNorm& norm, int64_t length, float* y, int64_t n_channels) {
  if (norm.bias == nullptr) return norm_row_of<Norm::kRms>(x, norm, length, y, n_channels);
  norm_row_of<Norm::kLayer>(x, norm, length, y, n_channels);
}

void norm_tile(const NormTile& tile) {
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    norm_row(tile.x.data + i * tile.x.stride, tile.norm, tile.length[i], tile.y.data + i * tile.y.stride,
             tile.n_channels);
  }
}

// Turns the pairs of channels (i, i + n) of a head.
REVIT_INLINE void turn_head(float* x, const float* cosines, const float* sines, int64_t n) {
  constexpr int lanes = kLanes<float>;
  using V = Vec<float, lanes>;
  V first, second, c, s;
  const auto turn = [&]() __attribute__((always_inline)) {
    const V turned = first * c - second * s;
    second = second * c + first * s;
    first = turned;
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    first = load<lanes>(x + i);
    second = load<lanes>(x + n + i);
    c = load<lanes>(cosines + i);
    s = load<lanes>(sines + i);
    turn();
    store<lanes>(x + i, first);
    store<lanes>(x + n + i, second);
  }
  if (const int64_t left = n - i) {
    first = load_first<lanes>(x + i, left);
    second = load_first<lanes>(x + n + i, left);
    c = load_first<lanes>(cosines + i, left);
    s = load_first<lanes>(sines + i, left);
    turn();
    store_first<lanes>(x + i, first, left);
    store_first<lanes>(x + n + i, second, left);
  }
}

void finish_heads(const BlockTile& tile) {
  const BlockWeights& next = *tile.next;
  const int64_t head_dim = next.head_dim, begin = tile.first_panel * kLinearPanel, end = tile.end_panel * kLinearPanel;
  const auto finish = [&](int64_t column, const TokenNorm& norm) {
    if (column < begin || column >= end) return;
    for (int64_t i = 0; i < tile.n_rows; ++i) {
      float* head = tile.projected.data + i * tile.projected.stride + column - begin;
      const bool turns = next.rotary.table != nullptr && tile.position != nullptr && tile.position[i] >= 0;
      const float* angles = turns ? next.rotary.table + tile.position[i] * next.rotary.n_tables * head_dim : nullptr;
      for (int64_t h = 0; h < next.n_heads; ++h, head += head_dim) {
        if (norm.weight != nullptr) norm_row(head, norm, 0, head, head_dim);
        if (!turns) continue;
        turn_head(head, angles, angles + head_dim / 2, head_dim / 2);
        if (next.rotary.n_tables > 1) angles += head_dim;
      }
    }
  };
  finish(0, next.q_norm);
  finish(next.parts_before_keys() * whole_panels(next.width()), next.k_norm);
}

// x *= sigmoid(gates)
REVIT_INLINE void gate_row(const float* gates, float* x, int64_t n) {
  constexpr int lanes = kLanes<float>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    store<lanes>(x + i, load<lanes>(x + i) * sigmoid<lanes>(load<lanes>(gates + i)));
  }
  if (const int64_t left = n - i) {
    store_first<lanes>(x + i, load_first<lanes>(x + i, left) * sigmoid<lanes>(load_first<lanes>(gates + i, left)),
                       left);
  }
}

void finish_attended(const BlockTile& tile) {
  const BlockWeights& block = *tile.block;
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    float* row = tile.attended.data + i * tile.attended.stride;
    if (block.out_norm.weight != nullptr) norm_row(row, block.out_norm, tile.length[i], row, block.width());
    if (block.gated_attention) gate_row(tile.gates.data + i * tile.gates.stride, row, block.width());
  }
}

template <class W>
void block_tile(const BlockTile& tile) {
  [[maybe_unused]] const TileState<W> state;
  const BlockWeights& sized = *(tile.attended.data != nullptr ? tile.block : tile.next);
  const int64_t rows = whole_rows<W>(tile.n_rows), n_channels = sized.n_channels;
  const RowFloats floats = row_floats<W>(sized);
  const int64_t a_stride = floats.normed, h_stride = floats.hidden;
  const int64_t panel_sums = rows * kLinearPanel;
  const auto [normed, hidden, sums, one_panel, rounded, rounded_hidden] =
      Arrays<float, 6>({rows * a_stride, rows * h_stride, rows * floats.sums, panel_sums, rows * floats.rounded,
                        rows * floats.rounded_hidden})
          .array;
  const auto factors = [&](const Rows& in, int64_t n, float* memory) {
    return factors_of<W>(in.data, in.stride, tile.n_rows, n, memory);
  };
  const auto norm = [&](const TokenNorm& parameters) {
    norm_tile({tile.x, {normed, a_stride}, tile.length, tile.n_rows, parameters, n_channels});
    return factors({normed, a_stride}, n_channels, rounded);
  };
  const auto linear = [&](const PackedWeight& weight, const Rows& in, const Rows& out, Finish finish) {
    return LinearTile{in.data,         in.stride, tile.n_rows,      weight,   0,
                      weight.n_panels, finish,    sized.activation, out.data, out.stride};
  };

  if (tile.attended.data != nullptr) {
    const BlockWeights& block = *tile.block;
    if (block.finishes_attended()) finish_attended(tile);
    linear_chains<W>(linear(block.proj, tile.attended, tile.x, Finish::kAdd),
                     factors(tile.attended, block.width(), rounded), 0, block.width(), one_panel, 0);
    const Factors<W> a = norm(block.norm2);
    const Rows hidden_rows = {hidden, h_stride};
    const LinearTile fc2 = linear(block.fc2, hidden_rows, tile.x, Finish::kAdd);
    const int64_t chunk = hidden_chunk<W>(block), hidden_panels = whole_panels(block.hidden) / kLinearPanel;
    for (int64_t k = 0; k < block.hidden; k += chunk) {
      const int64_t end = std::min(k + chunk, block.hidden);
      LinearTile fc1 = linear(block.fc1, {normed, a_stride}, hidden_rows, Finish::kActivate);
      fc1.first_panel = k / kLinearPanel;
      fc1.end_panel = whole_panels(end) / kLinearPanel;
      linear_chains<W>(fc1, a, 0, n_channels, one_panel, 0);
      if (block.gated_mlp) {
        fc1.first_panel += hidden_panels;
        fc1.end_panel += hidden_panels;
        fc1.finish = Finish::kMultiply;
        linear_chains<W>(fc1, a, 0, n_channels, one_panel, 0);
      }
      if (block.mlp_norm.weight != nullptr) {
        norm_tile({hidden_rows, hidden_rows, tile.length, tile.n_rows, block.mlp_norm, block.hidden});
      }
      linear_chains<W>(fc2, factors(hidden_rows, end - k, rounded_hidden), k, end, sums, panel_sums);
    }
  }
  if (tile.projected.data != nullptr) {
    const Factors<W> a = norm(tile.next->norm1);
    LinearTile next = linear(tile.next->qkv, {normed, a_stride}, tile.projected, Finish::kStore);
    next.first_panel = tile.first_panel;
    next.end_panel = tile.end_panel;
    linear_chains<W>(next, a, 0, n_channels, one_panel, 0);
    if (tile.next->finishes_heads()) finish_heads(tile);
  }
}

void row_to_float(const EmbedTile& tile, int64_t row, float* out) {
  const int64_t n = tile.embed.depth, first = row * n;
  if (tile.bytes) {
    const uint8_t* pixels = static_cast<const uint8_t*>(tile.rows) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = pixels[i];
    return;
  }
  switch (tile.dtype) {
    case DType::kBFloat16:
      return widen_row(static_cast<const BFloat16*>(tile.rows) + first, n, n, 1.0f, out);
    case DType::kFloat16:
      return widen_row(static_cast<const Float16*>(tile.rows) + first, n, n, 1.0f, out);
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<const double*>(tile.rows)[first + i]);
      return;
    default:
      std::memcpy(out, static_cast<const float*>(tile.rows) + first, n * sizeof(float));
  }
}

template <class W>
void embed_tile(const EmbedTile& tile) {
  [[maybe_unused]] const TileState<W> state;
  const int64_t rows = whole_rows<W>(tile.n_rows), depth = tile.embed.depth, n_channels = tile.n_channels;
  const int64_t a_stride = odd_lines(depth), out_stride = odd_lines(whole_panels(n_channels));
  const auto [a, out, one_panel, rounded] =
      Arrays<float, 4>({rows * a_stride, rows * out_stride, rows * kLinearPanel, rows * factors_size<W>(depth)}).array;
  for (int64_t i = 0; i < tile.n_rows; ++i) row_to_float(tile, i, a + i * a_stride);
  linear_chains<W>({a, a_stride, tile.n_rows, tile.embed, 0, tile.embed.n_panels, Finish::kStore, Activation::kNone,
                    out, out_stride},
                   factors_of<W>(a, a_stride, tile.n_rows, depth, rounded), 0, depth, one_panel, 0);
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    const int64_t token = tile.token[i];
    float* row = out + i * out_stride;
    if (tile.norm.weight != nullptr) norm_row(row, tile.norm, tile.length[token], row, n_channels);
    add_elements<float>({row, tile.table + tile.position[token] * n_channels,
                         tile.tokens.data + token * tile.tokens.stride, n_channels});
  }
}
