// Linear layers on packed weights (see linear.h), by the products of microkernel.inl.h.

// Rows that are computed where a block has `n_rows`, at most kRowsOf<W>.
template <class W>
REVIT_INLINE int64_t computed_rows(int64_t n_rows) {
  if constexpr (kTiles<W>) return n_rows;
  return n_rows > kHalfBlock ? kLinearRows : kHalfBlock;
}

template <class W, Chain kind>
REVIT_INLINE void multiply_chain(const BlockArgs<W>& args, int64_t n_rows) {
#if REVIT_AMX
  if constexpr (kTiles<W>) return multiply_tiles<W, kind>(args, n_rows);
#endif
  if (n_rows > kHalfBlock) return multiply_weights<W, kLinearRows, kind>(args);
  multiply_weights<W, kHalfBlock, kind>(args);
}

template <class W>
REVIT_INLINE void finish_block(const BlockArgs<W>& args, int64_t n_rows, bool last, Finish finish,
                               Activation activation) {
  if (!last) return multiply_chain<W, Chain::kInner>(args, n_rows);
  if (finish == Finish::kAdd) return multiply_chain<W, Chain::kAdd>(args, n_rows);
  if (finish == Finish::kMultiply) return multiply_chain<W, Chain::kMultiply>(args, n_rows);
  multiply_chain<W, Chain::kStore>(args, n_rows);
  if (finish == Finish::kActivate) activate_block(activation, args.out, args.out_stride, computed_rows<W>(n_rows));
}

// Computes the chains [first_k, end_k) of `tile`; if `end_k` is not the whole depth, a later call continues. `partial`
// keeps [n_panels][rows, whole half blocks][panel] sums from one call to the next, or those of one panel if one call
// does everything. `a` holds the rows of the tile, from depth first_k on.
template <class W>
void linear_chains(const LinearTile& tile, const Factors<W>& a, int64_t first_k, int64_t end_k, float* partial,
                   int64_t partial_stride) {
  const int64_t depth = tile.weight.depth, chain = chain_of<W>(depth);
  const W* panels = static_cast<const W*>(tile.weight.panels);
  for (int64_t p = tile.first_panel; p < tile.end_panel; ++p) {
    const W* panel = panels + p * panel_size<W>(depth);
    float* sums = partial + (p - tile.first_panel) * partial_stride;
    float* out = tile.out + (p - tile.first_panel) * kLinearPanel;
    for (int64_t k = first_k; k < end_k; k += chain) {
      BlockArgs<W> args = {{},
                           std::min(chain, depth - k),
                           a.from_depth(k - first_k),
                           panel + panel_size<W>(k),
                           sums,
                           k == 0,
                           nullptr,
                           0,
                           tile.weight.bias + p * kLinearPanel,
                           out,
                           tile.out_stride};
      if constexpr (kInteger<W>) {
        args.column_scales = tile.weight.scales + p * kLinearPanel;
        args.column_offsets = tile.weight.offsets + (k / chain * tile.weight.n_panels + p) * kLinearPanel;
      }
      const bool last = k + args.depth == depth;
      // Every tile reads the weights once, from beyond the L2 cache. While a chain is multiplied, the next one in
      // memory is prefetched; each block of rows prefetches a share. Of few bytes, rounding down would lose a quarter.
      args.ahead = reinterpret_cast<const char*>(panel + panel_size<W>(k + args.depth));
      args.ahead_step = static_cast<int64_t>(kStep<W> * kLinearPanel * sizeof(W)) * kRowsOf<W> / tile.n_rows;
      if constexpr (kInteger<W>) ++args.ahead_step;
      for (int64_t row = 0; row < tile.n_rows; row += kRowsOf<W>) {
        finish_block<W>(args, std::min(kRowsOf<W>, tile.n_rows - row), last, tile.finish, tile.activation);
        args.ahead += args.ahead_step * (args.depth / kStep<W>);
        args.a.advance(kRowsOf<W>);
        args.partial += kRowsOf<W> * kLinearPanel;
        args.out += kRowsOf<W> * tile.out_stride;
      }
    }
  }
}

// Rows that the arrays of a tile must have.
template <class W>
REVIT_INLINE int64_t whole_rows(int64_t n_rows) {
  return round_up(n_rows, kTiles<W> ? kTileRows : kHalfBlock);
}

// Size of a row of `depth` factors, in floats; 0 if the rows are used as they are.
template <class W>
REVIT_INLINE int64_t factors_size(int64_t depth) {
  if constexpr (kInteger<W>) return QuantizedRows::size(depth, chain_of<W>(depth));
#if REVIT_BF16
  if constexpr (kRounded<W>) return RoundedRows::size(depth);
#endif
  return 0;
}

// The factors of rows [0, n_rows) of `depth` values, rounded into `memory` if need be.
template <class W>
REVIT_INLINE Factors<W> factors_of(const float* rows, int64_t stride, int64_t n_rows, int64_t depth, float* memory) {
  if constexpr (kInteger<W>) {
    return quantize_rows(rows, stride, n_rows, depth, chain_of<W>(depth), memory);
#if REVIT_BF16
  } else if constexpr (kRounded<W>) {
    return round_rows(rows, stride, n_rows, depth, memory);
#endif
  } else {
    return {rows, stride};
  }
}

// The state of this thread while a tile with weights of type W is computed.
struct NoState {};
#if REVIT_AMX
template <class W>
using TileState = std::conditional_t<kTiles<W>, TileSession, NoState>;
#else
template <class W>
using TileState = NoState;
#endif

template <class W>
void linear_tile(const LinearTile& tile) {
  [[maybe_unused]] const TileState<W> state;
  const int64_t rows = whole_rows<W>(tile.n_rows), depth = tile.weight.depth;
  const auto [partial, rounded] = Arrays<float, 2>({rows * kLinearPanel, rows * factors_size<W>(depth)}).array;
  const Factors<W> a = factors_of<W>(tile.a, tile.a_stride, tile.n_rows, depth, rounded);
  linear_chains<W>(tile, a, 0, depth, partial, 0);
}
