// Rows rounded for products with 16-bit or 8-bit weights: their left factors.
//
// For int8 weights:
//
//   a[i, k] ~ scales[i, k / chain] q[i, k],   scale = max |a| / 127 over the chain of the row,   q = round(a / scale)
//
// A row's integers and scales depend on the row alone. Where one instruction multiplies and adds four depths of bytes
// (vpdpbusd, tdpbusd), which must be unsigned on the left, rows are kept as bytes q + 128, and what 128 adds to a sum
// is taken off again (PackedWeight::offsets). Elsewhere rows are kept as int16, of which one instruction multiplies two
// depths (pmaddwd). Either way the sums are the same integers.
//
// For bfloat16 weights, where the instruction set multiplies bfloat16, a row is rounded to bfloat16, to nearest even.

// Depths in a 32-bit lane of a row and of an int8 weight.
inline constexpr int kIntegerDepths = REVIT_VNNI ? 4 : 2;
using Integer = std::conditional_t<REVIT_VNNI != 0, uint8_t, int16_t>;
inline constexpr int32_t kIntegerZero = REVIT_VNNI ? 128 : 0;

// int32 holds the sums of a chain for any int16 rows, and float those of bytes, so that adding an offset is exact.
static_assert(kMaxIntegerChain * 127 * (1 << 15) <= std::numeric_limits<int32_t>::max());
static_assert(kMaxIntegerChain * 127 * 255 <= 1 << 24);

// Chains whose largest value is below this count as zero: 127 / largest must be finite, and largest / 127 a normal
// number.
inline constexpr float kLeastScaled = 0x1p-119f;

// Bits of the largest |a| of n values. Bits have the order of the numbers, with infinity and NaN above all others.
REVIT_INLINE int32_t largest_bits(const float* a, int64_t n) {
  constexpr int lanes = kLanes<float>;
  using I = Vec<int32_t, lanes>;
  const auto magnitude = [](Vec<float, lanes> v) __attribute__((always_inline)) {
    I bits;
    __builtin_memcpy(&bits, &v, sizeof(bits));
    return bits & 0x7fffffff;
  };
  I largest = {};
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) {
    const I bits = magnitude(load<lanes>(a + k));
    largest = bits > largest ? bits : largest;
  }
  if (k < n) {
    const I bits = magnitude(load_first<lanes>(a + k, n - k));
    largest = bits > largest ? bits : largest;
  }
  return reduce_max<int32_t, lanes>(largest);
}

// Writes n integers, up to the next whole vector, and returns their scale. The scale is zero if all values
// are (nearly) zero, and NaN if a value is infinite or NaN, so that all results of the row are NaN.
REVIT_INLINE float quantize_chain(const float* a, int64_t n, Integer* q) {
  constexpr int lanes = kLanes<float>;
  const int32_t bits = largest_bits(a, n);
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof(largest));
  const bool scaled = largest >= kLeastScaled && largest <= std::numeric_limits<float>::max();
  const float inverse = scaled ? 127.0f / largest : 0.0f;
  const auto put = [&](int64_t k, Vec<float, lanes> v) __attribute__((always_inline)) {
    const auto integers = round_to_int<lanes>(v * inverse) + kIntegerZero;
    const auto rounded = __builtin_convertvector(integers, Vec<Integer, lanes>);
    __builtin_memcpy(q + k, &rounded, sizeof(rounded));
  };
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) put(k, load<lanes>(a + k));
  if (k < n) put(k, load_first<lanes>(a + k, n - k));
  return scaled ? largest / 127.0f : largest < kLeastScaled ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

// Stride of rows of n floats: an odd number of cache lines, so that rows do not compete for the same cache sets.
REVIT_INLINE int64_t odd_lines(int64_t n) { return (((n + 15) / 16) | 1) * 16; }

// Rows of integers.
struct QuantizedRows {
  int32_t* data;   // q of kIntegerDepths depths in a lane
  float* scales;   // one for every chain, after the integers of the row
  int64_t stride;  // of data and of scales
  int64_t chain;

  // Lanes of n integers, up to the next whole cache line.
  static int64_t lanes(int64_t n) { return round_up((n + kIntegerDepths - 1) / kIntegerDepths, 16); }
  // Size of a row of n values, in floats.
  static int64_t size(int64_t n, int64_t chain) { return odd_lines(lanes(n) + (n + chain - 1) / chain); }

  REVIT_INLINE void advance(int64_t rows) {
    data += rows * stride;
    scales += rows * stride;
  }
  REVIT_INLINE QuantizedRows from_depth(int64_t k) const {
    return {data + k / kIntegerDepths, scales + k / chain, stride, chain};
  }
};

// Rounds rows [0, n_rows) of n values, in chains of `chain`, into `memory`.
QuantizedRows quantize_rows(const float* rows, int64_t stride, int64_t n_rows, int64_t n, int64_t chain,
                            float* memory) {
  const QuantizedRows out = {reinterpret_cast<int32_t*>(memory), memory + QuantizedRows::lanes(n),
                             QuantizedRows::size(n, chain), chain};
  QuantizedRows row = out;
  for (int64_t i = 0; i < n_rows; ++i, row.advance(1)) {
    for (int64_t k = 0; k < n; k += chain) {
      Integer* q = reinterpret_cast<Integer*>(row.data) + k;
      row.scales[k / chain] = quantize_chain(rows + i * stride + k, std::min(chain, n - k), q);
    }
  }
  return out;
}

#if REVIT_BF16
// Rows of bfloat16.
struct RoundedRows {
  const int32_t* data;  // the values of two depths in a lane, zero beyond an odd depth
  int64_t stride;

  // Size of a row of n values, in floats.
  static int64_t size(int64_t n) { return odd_lines(round_up((n + 1) / 2, 16)); }

  REVIT_INLINE void advance(int64_t rows) { data += rows * stride; }
  REVIT_INLINE RoundedRows from_depth(int64_t k) const { return {data + k / 2, stride}; }
};

// Rounds n values, and writes zeros up to the next whole cache line.
REVIT_INLINE void round_row(const float* in, int64_t n, BFloat16* out) {
  constexpr int lanes = kLanes<float>;
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) store_factors<lanes>(out + k, load<lanes>(in + k));
  if (k < n) store_factors<lanes>(out + k, load_first<lanes>(in + k, n - k));
  for (k = round_up(n, lanes); k % 32 != 0; k += lanes) store_factors<lanes>(out + k, Vec<float, lanes>{});
}

// Rounds rows [0, n_rows) of n values into `memory`.
RoundedRows round_rows(const float* rows, int64_t stride, int64_t n_rows, int64_t n, float* memory) {
  const int64_t out_stride = RoundedRows::size(n);
  for (int64_t i = 0; i < n_rows; ++i) {
    round_row(rows + i * stride, n, reinterpret_cast<BFloat16*>(memory + i * out_stride));
  }
  return {reinterpret_cast<const int32_t*>(memory), out_stride};
}
#endif
