// Attention within one sequence and head, after FlashAttention-2 (Dao 2023):
//
//   S = scale Q Kᵀ,  P = exp(S - lse),  O = P V
//   dP = dO Vᵀ,  dS = P (dP - delta),  delta = rowsum(dO O) - dlse
//   dQ = scale dS K,  dK = scale dSᵀ Q,  dV = Pᵀ dO
//
// If a tile sees all keys at once, P is divided by its own sum and delta is computed as rowsum(P dP). Both are then
// free of the rounding of lse and of O.
//
// An item packs its keys and values once (gemm.inl.h) and then processes its queries in tiles. A sequence of at most
// kMaxKeys keys is one block, so a tile's exact row maxima are known before the first exponential. A longer sequence is
// cut into equal blocks; their partial results are rescaled when a maximum grows. Scores are kept in units of log 2, so
// that exp becomes 2^x. Tiles and blocks are counted from the start of the sequence and depend on its lengths alone.

// Queries of a tile, forward and backward. The backward products reduce over the rows of a tile and need more of them.
inline constexpr int64_t kRowTile = 24;
inline constexpr int64_t kGradRowTile = 48;
inline constexpr int64_t kMaxKeys = 512;
static_assert(kMaxKeys + kBlockRows <= kTileStride);
static_assert(kRowTile % kBlockRows == 0 && kGradRowTile % kBlockRows == 0);

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// Keys of a block: the sequence is cut into the fewest equal parts of at most kMaxKeys, rounded up to whole panels.
template <class T>
REVIT_INLINE int64_t key_block(int64_t n_keys) {
  const int64_t n_blocks = std::max<int64_t>(1, (n_keys + kMaxKeys - 1) / kMaxKeys);
  return round_up((n_keys + n_blocks - 1) / n_blocks, kPanel<T>);
}

// Keys that the query at `row` sees: all, or in causal attention those up to the diagonal, which ends at the bottom
// right.
REVIT_INLINE int64_t visible_keys(const AttentionArgs& args, const AttentionItem& item, int64_t row) {
  if (!args.causal) return item.n_keys;
  return std::max<int64_t>(0, std::min(item.n_keys, row + 1 + item.n_keys - item.n_queries));
}

// 2^x for x <= 0 or NaN; 0 below 2^-126. Relative error about 1e-7.
template <class T, int n>
REVIT_INLINE Vec<T, n> exp2_nonpositive(Vec<T, n> x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < n; ++i) x[i] = std::exp2(x[i]);
    return x;
  } else {
    // At -127 the exponent field below is zero, and so is the result. A NaN passes the comparison.
    const Vec<T, n> lowest = broadcast<T, n>(-127.0f);
    x = lowest > x ? lowest : x;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
    const Vec<T, n> shifted = x + 12582912.0f;
    const Vec<T, n> f = x - (shifted - 12582912.0f);
    Vec<T, n> p = broadcast<T, n>(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    Vec<uint32_t, n> exponent;
    __builtin_memcpy(&exponent, &shifted, sizeof(exponent));
    exponent = (exponent << 23) + (127u << 23);
    Vec<T, n> power;
    __builtin_memcpy(&power, &exponent, sizeof(power));
    return p * power;
  }
}

template <class T>
REVIT_INLINE T exp2_nonpositive_scalar(T x) {
  return exp2_nonpositive<T, 4>(broadcast<T, 4>(x))[0];
}

// Running softmax of one query: the maximum so far and the sum of 2^(s - maximum).
template <class T>
struct RowState {
  T maximum = -std::numeric_limits<T>::infinity();
  T sum = 0;
};

// The first `n_kept` lanes of v, and `other` in the rest.
template <class T, int n>
REVIT_INLINE Vec<T, n> lanes_below(Vec<T, n> v, int64_t n_kept, T other) {
  Vec<T, n> lane;
  unroll<n>([&](auto i) __attribute__((always_inline)) { lane[int{i}] = static_cast<T>(int{i}); });
  return lane < broadcast<T, n>(static_cast<T>(n_kept)) ? v : broadcast<T, n>(other);
}

// The maximum of `maximum` and the first `visible` scores of a row. The other scores, up to `padded` (whole vectors),
// become -inf.
template <class T>
REVIT_INLINE T row_maximum(T* s, int64_t visible, int64_t padded, T maximum) {
  constexpr int n = kLanes<T>;
  Vec<T, n> maxima = broadcast<T, n>(maximum);
  int64_t j = 0;
  for (; j + n <= visible; j += n) {
    const Vec<T, n> x = load<n>(s + j);
    maxima = maxima > x ? maxima : x;
  }
  for (; j < padded; j += n) {
    const Vec<T, n> x = lanes_below<T, n>(load<n>(s + j), visible - j, -std::numeric_limits<T>::infinity());
    store<n>(s + j, x);
    maxima = maxima > x ? maxima : x;
  }
  return reduce_max<T, n>(maxima);
}

// Writes 2^(scale (s - maximum)) of one row of scores to `out`, which may be the row itself. Returns the factor that
// rescales earlier blocks to the new maximum. With numbers in `out` the scores are scaled already, and scale is 1.
template <class T, class E>
REVIT_INLINE T exponentiate_row(const T* s, int64_t padded, T scale, T maximum, RowState<T>& state, E* out) {
  constexpr int n = kLanes<T>;
  const T origin = maximum == -std::numeric_limits<T>::infinity() ? T(0) : maximum;
  const T scaled_origin = kIsPair<E> ? scale * origin : origin;
  Vec<T, n> sums = {};
  for (int64_t j = 0; j < padded; j += n) {
    Vec<T, n> x = load<n>(s + j);
    if constexpr (kIsPair<E>) x = x * scale;
    const Vec<T, n> p = exp2_nonpositive<T, n>(x - scaled_origin);
#if REVIT_BF16
    if constexpr (kIsPair<E>) store_factors<n>(reinterpret_cast<BFloat16*>(out) + j, p);
#endif
    if constexpr (!kIsPair<E>) store<n>(out + j, p);
    sums += p;
  }
  T before = state.maximum;
  if constexpr (kIsPair<E>) before = before * scale;
  const T correction = state.sum == 0 ? T(0) : exp2_nonpositive_scalar<T>(before - scaled_origin);
  state.maximum = maximum;
  state.sum = state.sum * correction + reduce_add<T, n>(sums);
  return correction;
}

template <class T>
REVIT_INLINE void scale_row(T* row, int64_t n, T factor) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < n; i += lanes) store<lanes>(row + i, factor * load<lanes>(row + i));
}

// out[i] = factor * in[i] for i < n, rounded to T.
template <class T>
REVIT_INLINE void narrow_row(const Compute<T>* in, int64_t n, Compute<T> factor, T* out) {
  constexpr int lanes = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<lanes>(out + i, factor * load<lanes>(in + i));
  for (; i < n; ++i) narrow(factor * in[i], out + i);
}

template <class T>
REVIT_INLINE const T* row_of(const Heads& heads, int64_t row, int64_t head) {
  return static_cast<const T*>(heads.data) + row * heads.row_stride + head * heads.head_stride;
}
template <class T>
REVIT_INLINE T* row_of(const MutableHeads& heads, int64_t row, int64_t head) {
  return static_cast<T*>(heads.data) + row * heads.row_stride + head * heads.head_stride;
}

// Prefetches rows [begin, begin + n_rows) of a head. The next head's rows lie beside this one's, and the same thread is
// likely to take that head next (see attention_plan.cpp); waiting for its rows would cost a tenth of the time.
template <class T>
REVIT_INLINE void prefetch_rows(const Heads& heads, int64_t begin, int64_t n_rows, int64_t head, int64_t dim) {
  for (int64_t i = 0; i < n_rows; ++i) {
    const T* row = row_of<T>(heads, begin + i, head);
    for (int64_t j = 0; j < dim; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + j, 0, 2);
  }
}

// Reads and writes elements of type T. The products are of elements of type E: of numbers, or of pairs of bfloat16, to
// which queries, keys, values and exponentials are then rounded.
template <class T, class E = Compute<T>>
void attention_forward(const AttentionForward& args, const AttentionItem& item) {
  using C = Compute<T>;
  const int64_t dim = args.head_dim, n_keys = item.n_keys;
  const int64_t padded_dim = round_up(dim, kLanes<C>);
  const int64_t block = key_block<C>(n_keys);

  constexpr int64_t tile_size = kRowTile * kTileStride;
  static_assert(sizeof(E) == sizeof(C));
  const auto [q_array, s_tile, p_array, o_tile, k_array, v_array] =
      Arrays<C, 6>({tile_size, tile_size, kIsPair<E> ? tile_size : 0, tile_size,
                    panels_size<C>(elements<E>(dim), n_keys), panels_size<C>(elements<E>(n_keys), dim)})
          .array;
  E* q_tile = reinterpret_cast<E*>(q_array);
  E* p_tile = reinterpret_cast<E*>(kIsPair<E> ? p_array : s_tile);
  const Panels<E> k_transposed = pack_transposed(row_of<T>(args.k, item.k_begin, item.kv_head), args.k.row_stride,
                                                 n_keys, dim, reinterpret_cast<E*>(k_array));
  const Panels<E> v = pack_panels(row_of<T>(args.v, item.k_begin, item.kv_head), args.v.row_stride, n_keys, dim,
                                  reinterpret_cast<E*>(v_array));
  // Numbers are scaled in the queries. Queries that are rounded keep their values: of the scale they get the sign, and
  // the scores the rest.
  C query_scale = static_cast<C>(args.scale * kLog2E), score_scale = 1;
  if (kIsPair<E> && query_scale != 0) {
    score_scale = std::abs(query_scale);
    query_scale = query_scale < 0 ? C(-1) : C(1);
  }

  for (int64_t member = 0; member < args.group; ++member) {
    const int64_t head = item.kv_head * args.group + member;
    const int64_t end = item.first_row + item.n_rows;
    for (int64_t first = item.first_row; first < end; first += kRowTile) {
      const int64_t rows = std::min(kRowTile, end - first);
      const int64_t tile_keys = visible_keys(args, item, first + rows - 1);
      pack_tile(row_of<T>(args.q, item.q_begin + first, head), args.q.row_stride, rows, dim, query_scale, q_tile);
      if (head + 1 < args.n_heads) prefetch_rows<T>(args.q, item.q_begin + first, rows, head + 1, dim);
      if (member == 0 && head + args.group < args.n_heads) {
        const int64_t key_rows = std::min(rows, n_keys - first);
        prefetch_rows<T>(args.k, item.k_begin + first, key_rows, item.kv_head + 1, dim);
        prefetch_rows<T>(args.v, item.k_begin + first, key_rows, item.kv_head + 1, dim);
      }
      RowState<C> state[kRowTile];
      for (int64_t key = 0; key < tile_keys; key += block) {
        const int64_t keys = std::min(block, tile_keys - key);
        multiply(rows, keys, elements<E>(dim), q_tile, k_transposed.from_column(key), 0, s_tile, kTileStride, false);
        // Two passes over the tile: a row's second step would wait for the row's own reduction to one number.
        const int64_t padded_keys = round_up(keys, kLanes<C>);
        C maximum[kRowTile];
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t visible = std::max<int64_t>(0, std::min(keys, visible_keys(args, item, first + i) - key));
          maximum[i] = row_maximum(s_tile + i * kTileStride, visible, padded_keys, state[i].maximum);
        }
        for (int64_t i = 0; i < rows; ++i) {
          const C correction = exponentiate_row(s_tile + i * kTileStride, padded_keys, score_scale, maximum[i],
                                                state[i], p_tile + i * kTileStride);
          if (key > 0) scale_row(o_tile + i * kTileStride, padded_dim, correction);
        }
        multiply(rows, dim, elements<E>(keys), p_tile, v, elements<E>(key), o_tile, kTileStride, key > 0);
      }
      for (int64_t i = 0; i < rows; ++i) {
        T* out = row_of<T>(args.out, item.q_begin + first + i, head);
        if (state[i].sum == 0) {
          fill_row(out, dim, T{});
        } else {
          narrow_row(o_tile + i * kTileStride, dim, 1 / state[i].sum, out);
        }
      }
      if (args.lse == nullptr) continue;
      C* lse = static_cast<C*>(args.lse) + head * args.lse_head_stride + item.q_begin + first;
      for (int64_t i = 0; i < rows; ++i) {
        lse[i] =
            state[i].sum == 0
                ? -std::numeric_limits<C>::infinity()
                : static_cast<C>(kLn2 * (double(score_scale) * state[i].maximum + std::log2(double(state[i].sum))));
      }
    }
  }
}

template <class T>
REVIT_INLINE Compute<T> dot_row(const T* a, const T* b, int64_t n) {
  using C = Compute<T>;
  constexpr int lanes = kLanes<C>;
  Vec<C, lanes> sums = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sums += load<lanes>(a + i) * load<lanes>(b + i);
  C sum = reduce_add<C, lanes>(sums);
  for (; i < n; ++i) sum += widen(a[i]) * widen(b[i]);
  return sum;
}

// Log-sum-exp in units of log 2 and its rounding error, which matters if scores are large.
template <class T>
struct Log2Sum {
  T high, low;

  explicit Log2Sum(T natural) : high(0), low(0) {
    if (natural == -std::numeric_limits<T>::infinity()) return;  // no key is seen, and all scores are -inf
    const double exact = natural * kLog2E;
    high = static_cast<T>(exact);
    low = static_cast<T>(exact - high);
  }
};

// Sums over one row of a tile in the backward pass.
template <class T>
struct RowSums {
  T p, p_dp;
};

// Turns one row of scores into p = 2^(s - lse), zero beyond `visible`. Returns the sums of p and of p dP.
template <class T>
REVIT_INLINE RowSums<T> probabilities_row(T* s, const T* dp, int64_t visible, int64_t padded, Log2Sum<T> lse) {
  constexpr int n = kLanes<T>;
  fill_row(s + visible, padded - visible, -std::numeric_limits<T>::infinity());
  Vec<T, n> p_sums = {}, p_dp_sums = {};
  for (int64_t j = 0; j < padded; j += n) {
    const Vec<T, n> p = exp2_nonpositive<T, n>(load<n>(s + j) - lse.high - lse.low);
    store<n>(s + j, p);
    p_sums += p;
    p_dp_sums += p * load<n>(dp + j);
  }
  return {reduce_add<T, n>(p_sums), reduce_add<T, n>(p_dp_sums)};
}

// Multiplies one row of p by `norm` and turns the row of dP into scale dS.
template <class T>
REVIT_INLINE void grad_scores_row(T* p, T* dp, int64_t padded, T norm, T delta, T scale) {
  constexpr int n = kLanes<T>;
  for (int64_t j = 0; j < padded; j += n) {
    const Vec<T, n> exact = norm * load<n>(p + j);
    store<n>(p + j, exact);
    store<n>(dp + j, scale * exact * (load<n>(dp + j) - delta));
  }
}

template <class T>
void attention_backward(const AttentionBackward& args, const AttentionItem& item) {
  using C = Compute<T>;
  const int64_t dim = args.head_dim, n_keys = item.n_keys;
  const int64_t padded_dim = round_up(dim, kLanes<C>);
  const int64_t block = key_block<C>(n_keys);

  constexpr int64_t tile_size = kGradRowTile * kTileStride;
  const int64_t by_keys = panels_size<C>(dim, n_keys), by_dim = panels_size<C>(n_keys, dim);
  const int64_t tile_panels = panels_size<C>(kGradRowTile, dim);
  const int64_t sums_size = (n_keys + 1) * padded_dim;
  const auto [q_tile, do_tile, s_tile, dp_tile, dq_tile, q_panels, do_panels, k_panels, kt_panels, vt_panels, dk, dv] =
      Arrays<C, 12>({tile_size, tile_size, tile_size, tile_size, tile_size, tile_panels, tile_panels, by_dim, by_keys,
                     by_keys, sums_size, sums_size})
          .array;
  const T* k_rows = row_of<T>(args.k, item.k_begin, item.kv_head);
  const T* v_rows = row_of<T>(args.v, item.k_begin, item.kv_head);
  const Panels<C> k = pack_panels(k_rows, args.k.row_stride, n_keys, dim, k_panels);
  const Panels<C> k_transposed = pack_transposed(k_rows, args.k.row_stride, n_keys, dim, kt_panels);
  const Panels<C> v_transposed = pack_transposed(v_rows, args.v.row_stride, n_keys, dim, vt_panels);
  fill_row(dk, sums_size, C(0));
  fill_row(dv, sums_size, C(0));
  const C scale = static_cast<C>(args.scale);

  for (int64_t member = 0; member < args.group; ++member) {
    const int64_t head = item.kv_head * args.group + member;
    for (int64_t first = 0; first < item.n_queries; first += kGradRowTile) {
      const int64_t rows = std::min(kGradRowTile, item.n_queries - first), begin = item.q_begin + first;
      const int64_t tile_keys = visible_keys(args, item, first + rows - 1);
      const T* q_rows = row_of<T>(args.q, begin, head);
      const T* do_rows = row_of<T>(args.grad_out, begin, head);
      pack_tile(q_rows, args.q.row_stride, rows, dim, static_cast<C>(args.scale * kLog2E), q_tile);
      pack_tile(do_rows, args.grad_out.row_stride, rows, dim, C(1), do_tile);
      const Panels<C> q = pack_panels(q_rows, args.q.row_stride, rows, dim, q_panels);
      const Panels<C> d_out = pack_panels(do_rows, args.grad_out.row_stride, rows, dim, do_panels);
      for (int64_t key = 0; key < tile_keys; key += block) {
        const int64_t keys = std::min(block, tile_keys - key);
        multiply(rows, keys, dim, q_tile, k_transposed.from_column(key), 0, s_tile, kTileStride, false);
        multiply(rows, keys, dim, do_tile, v_transposed.from_column(key), 0, dp_tile, kTileStride, false);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t visible = std::max<int64_t>(0, std::min(keys, visible_keys(args, item, first + i) - key));
          const int64_t padded = round_up(keys, kLanes<C>);
          C* p = s_tile + i * kTileStride;
          C* dp = dp_tile + i * kTileStride;
          const int64_t at = head * args.lse_head_stride + begin + i;
          const C d_lse = args.grad_lse != nullptr ? static_cast<const C*>(args.grad_lse)[at] : C(0);
          const RowSums<C> sums =
              probabilities_row(p, dp, visible, padded, Log2Sum<C>(static_cast<const C*>(args.lse)[at]));
          C norm = 1, delta;
          if (block < tile_keys) {
            delta = dot_row(do_rows + i * args.grad_out.row_stride, row_of<T>(args.out, begin + i, head), dim);
          } else {
            norm = visible == 0 ? C(0) : 1 / sums.p;
            delta = norm * sums.p_dp;
          }
          grad_scores_row(p, dp, padded, norm, delta - d_lse, scale);
        }
        multiply(rows, dim, keys, dp_tile, k, key, dq_tile, kTileStride, key > 0);
        multiply<C, true>(keys, dim, rows, dp_tile, q, 0, dk + key * padded_dim, padded_dim, true);
        multiply<C, true>(keys, dim, rows, s_tile, d_out, 0, dv + key * padded_dim, padded_dim, true);
      }
      for (int64_t i = 0; i < rows; ++i) {
        T* grad_q = row_of<T>(args.grad_q, begin + i, head);
        if (tile_keys == 0) {
          fill_row(grad_q, dim, T{});
        } else {
          narrow_row(dq_tile + i * kTileStride, dim, C(1), grad_q);
        }
      }
    }
  }
  for (int64_t j = 0; j < n_keys; ++j) {
    narrow_row(dk + j * padded_dim, dim, C(1), row_of<T>(args.grad_k, item.k_begin + j, item.kv_head));
    narrow_row(dv + j * padded_dim, dim, C(1), row_of<T>(args.grad_v, item.k_begin + j, item.kv_head));
  }
}

template <class T>
using RoundedElement = std::conditional_t<kPairProducts, Pair, Compute<T>>;

#ifndef REVIT_BASE
const AttentionKernels attention_kernels = {
    kRowTile,
    {attention_forward<float>, attention_forward<BFloat16, RoundedElement<BFloat16>>, attention_forward<Float16>,
     attention_forward<double>},
    attention_forward<float, RoundedElement<float>>,
    {attention_backward<float>, attention_backward<BFloat16>, attention_backward<Float16>, attention_backward<double>},
};
#endif
