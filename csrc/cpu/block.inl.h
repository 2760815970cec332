// A transformer block on a tile of rows (see block.h).
//
// Every tile reads all weights of a block once, while the tile's own activations stay in the L2 cache. So tiles are as
// tall as that cache allows. The MLP runs in chunks of hidden columns, which are the chains of its second layer: its
// sums grow chunk by chunk, in the order in which one product over the whole hidden row would add them. With int8
// weights a hidden row is rounded to integers chunk by chunk, because every chain has its own scale (see
// quantize.inl.h).

// Activations of a tile, in bytes: as much as the L2 cache (512 KiB on Zen 3) holds beside the weights that are read.
inline constexpr int64_t kTileBytes = 320 << 10;

// Sums of a tile are kept in whole panels.
REVIT_INLINE int64_t whole_panels(int64_t n) { return round_up(n, kLinearPanel); }

// Floats of one row of a tile in each array.
struct RowFloats {
  int64_t normed, hidden, sums, rounded, rounded_hidden;
};

template <class W>
RowFloats row_floats(const BlockShape& shape) {
  const int64_t chunk = chain_of<W>(shape.hidden), n_channels = shape.n_channels;
  return {odd_lines(n_channels), odd_lines(chunk), whole_panels(n_channels),
          std::max(factors_size<W>(n_channels), factors_size<W>(shape.width)), factors_size<W>(chunk)};
}

template <class W>
int64_t max_block_rows(const BlockShape& shape) {
  const RowFloats floats = row_floats<W>(shape);
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
void norm_rows(const NormTile& tile) {
  const int64_t n_channels = tile.n_channels;
  const float eps = static_cast<float>(tile.norm.eps);
  for (int64_t i = 0; i < tile.n_rows; ++i) {
    const float* x = tile.x.data + i * tile.x.stride;
    const float sum = RowSum<float, Sum::kNone, kNorm>{x, nullptr, nullptr, nullptr}(n_channels);
    const int64_t parameters = tile.length[i] * n_channels;
    const float* bias = kNorm == Norm::kLayer ? tile.norm.bias + parameters : nullptr;
    row_write<kNorm>(x, tile.norm.weight + parameters, bias, row_statistics<kNorm>(x, sum, eps, n_channels),
                     tile.y.data + i * tile.y.stride, n_channels);
  }
}

void norm_tile(const NormTile& tile) {
  if (tile.norm.bias == nullptr) return norm_rows<Norm::kRms>(tile);
  norm_rows<Norm::kLayer>(tile);
}

template <class W>
void block_tile(const BlockTile& tile) {
  [[maybe_unused]] const TileState<W> state;
  const BlockShape& shape = *tile.shape;
  const int64_t rows = whole_rows<W>(tile.n_rows), n_channels = shape.n_channels;
  const int64_t chunk = chain_of<W>(shape.hidden);
  const RowFloats floats = row_floats<W>(shape);
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
                      weight.n_panels, finish,    shape.activation, out.data, out.stride};
  };

  if (tile.attended.data != nullptr) {
    linear_chains<W>(linear(tile.proj, tile.attended, tile.x, Finish::kAdd),
                     factors(tile.attended, shape.width, rounded), 0, shape.width, one_panel, 0);
    const Factors<W> a = norm(tile.norm2);
    LinearTile fc1 = linear(tile.fc1, {normed, a_stride}, {hidden, h_stride}, Finish::kActivate);
    const LinearTile fc2 = linear(tile.fc2, {hidden, h_stride}, tile.x, Finish::kAdd);
    for (int64_t k = 0; k < shape.hidden; k += chunk) {
      const int64_t end = std::min(k + chunk, shape.hidden);
      fc1.first_panel = k / kLinearPanel;
      fc1.end_panel = whole_panels(end) / kLinearPanel;
      linear_chains<W>(fc1, a, 0, n_channels, one_panel, 0);
      linear_chains<W>(fc2, factors({hidden, h_stride}, end - k, rounded_hidden), k, end, sums, panel_sums);
    }
  }
  if (tile.projected.data != nullptr) {
    const Factors<W> a = norm(tile.next_norm);
    LinearTile next = linear(tile.next, {normed, a_stride}, tile.projected, Finish::kStore);
    next.first_panel = tile.first_panel;
    next.end_panel = tile.end_panel;
    linear_chains<W>(next, a, 0, n_channels, one_panel, 0);
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
    add_elements<float>({out + i * out_stride, tile.table + tile.position[i] * n_channels,
                         tile.tokens.data + tile.token[i] * tile.tokens.stride, n_channels});
  }
}
