// Separable resampling with integer weights, bit-equal to Pillow's 8-bit ImagingResample, straight into patch rows.
//
//   pass:  out[i] = clip8((2^21 + sum_t w[i, t] * in[first[i] + t]) >> 22)
//
// once along each axis. The intermediate is rounded to 8 bits, so the result depends on the order of the passes.
// Source rows pass through a ring buffer that holds the rows of the vertical taps of the next output rows. Its rows are
// resampled horizontally, or unchanged if the vertical pass comes first. No whole intermediate image exists.
//
// Vector code multiplies 16-bit factors (pmaddwd), so a weight is split as w = high * 2^11 + low and
//   sum w * v = (sum high * v) * 2^11 + sum low * v.
// Each pair product is exact (2 * 255 * 2^15 < 2^31). At worst the sums wrap modulo 2^32, and so do all later steps.
// The true total fits int32 (this is the purpose of Pillow's two bits of headroom), so the result is the same integer.

// A packed RGB row may be read this many bytes beyond its last pixel's first byte (one 16-byte load).
constexpr int64_t kRowOverrun = 16;
// Rows that a horizontal pass processes at once: one per 32-bit element of a vector.
constexpr int32_t kRowBlock = 8;
constexpr int32_t kRoundHalf = 1 << (kWeightBits - 1);

REVIT_INLINE int32_t tap_weight(const TapPair* pairs, int32_t t) {
  return pairs[t >> 1].high[t & 1] * (1 << kLowBits) + pairs[t >> 1].low[t & 1];
}

REVIT_INLINE uint8_t clip8(int32_t sum) {
  const int32_t value = sum >> kWeightBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

#if REVIT_LANES >= 8
// The same pair of 16-bit weights in every 32-bit element.
REVIT_INLINE __m256i broadcast_pair(const int16_t* weights) {
  int32_t bits;
  __builtin_memcpy(&bits, weights, sizeof(bits));
  return _mm256_set1_epi32(bits);
}

REVIT_INLINE __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Eight running sums, in the two parts of the split weights.
struct SplitSum {
  __m256i high, low;

  REVIT_INLINE SplitSum() : high(_mm256_setzero_si256()), low(_mm256_set1_epi32(kRoundHalf)) {}
  REVIT_INLINE void add(__m256i values, __m256i weights_high, __m256i weights_low) {
    high = _mm256_add_epi32(high, _mm256_madd_epi16(values, weights_high));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(values, weights_low));
  }
  REVIT_INLINE __m256i result() const {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low), kWeightBits);
  }
};
#endif

#if REVIT_LANES >= 8
// Turns kRowBlock packed RGB rows into columns, so that the horizontal pass becomes a sum over vectors.
// columns[(pixel pair, channel)] holds the two values of every row: 8 rows x (value, next value), 16 bits each.
REVIT_INLINE void rows_to_columns(const uint8_t* const* in, int32_t begin, int32_t end, __m256i* columns) {
  // Both lanes hold pixels 0 to 3. The lower lane becomes (r0 r1) (g0 g1) (b0 b1) (0 0), the upper the same of pixels
  // 2 and 3.
  const __m256i pairs_of_channels = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                                     6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  for (int32_t x = begin; x < end; x += 4, columns += 6) {
    __m256i channels[2][3];  // of rows 0-3 and 4-7; the first pixel pair in the lower lane, the second in the upper
    for (int half = 0; half < 2; ++half) {
      __m256i row[4];
      for (int r = 0; r < 4; ++r) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[4 * half + r] + 3 * int64_t{x}));
        row[r] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), pairs_of_channels);
      }
      const __m256i red_green01 = _mm256_unpacklo_epi32(row[0], row[1]), blue01 = _mm256_unpackhi_epi32(row[0], row[1]);
      const __m256i red_green23 = _mm256_unpacklo_epi32(row[2], row[3]), blue23 = _mm256_unpackhi_epi32(row[2], row[3]);
      channels[half][0] = _mm256_unpacklo_epi64(red_green01, red_green23);
      channels[half][1] = _mm256_unpackhi_epi64(red_green01, red_green23);
      channels[half][2] = _mm256_unpacklo_epi64(blue01, blue23);
    }
    for (int c = 0; c < 3; ++c) {
      _mm256_store_si256(columns + c, _mm256_permute2x128_si256(channels[0][c], channels[1][c], 0x20));
      _mm256_store_si256(columns + 3 + c, _mm256_permute2x128_si256(channels[0][c], channels[1][c], 0x31));
    }
  }
}

// One output pixel of every row from its columns: (r g b ?) in 32 bits per row.
REVIT_INLINE __m256i resample_column(const TapPair* pair, int32_t n_pairs, const __m256i* columns) {
  SplitSum red, green, blue;
  for (int32_t p = 0; p < n_pairs; ++p, columns += 3) {
    const __m256i high = broadcast_pair(pair[p].high), low = broadcast_pair(pair[p].low);
    red.add(_mm256_load_si256(columns), high, low);
    green.add(_mm256_load_si256(columns + 1), high, low);
    blue.add(_mm256_load_si256(columns + 2), high, low);
  }
  const __m256i blue_sum = blue.result();
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packs_epi32(red.result(), green.result()), _mm256_packs_epi32(blue_sum, blue_sum));
  const __m256i by_row =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, -1, 1, 5, 9, -1, 2, 6, 10, -1, 3, 7, 11, -1));
  return _mm256_shuffle_epi8(bytes, by_row);
}
#endif

// Resamples kRowBlock packed RGB rows to `n_out` pixels each. Reads and writes up to kRowOverrun bytes from a pixel on;
// `columns_memory` is scratch memory.
REVIT_INLINE void resample_horizontal(const ResizeAxis& axis, int32_t n_out, const uint8_t* const* in,
                                      uint8_t* const* out, [[maybe_unused]] uint8_t* columns_memory) {
#if REVIT_LANES >= 8
  __m256i* const columns = reinterpret_cast<__m256i*>(columns_memory);
  const int32_t begin = axis.first[0], end = axis.first[n_out - 1] + axis.n_taps[n_out - 1];
  rows_to_columns(in, begin, end, columns);
  const __m256i drop_fourth =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  for (int32_t x = 0; x < n_out; x += 4) {
    __m256i pixel[4];
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t at = x + i < n_out ? x + i : n_out - 1;
      pixel[i] = resample_column(axis.pairs + at * axis.pairs_stride, (axis.n_taps[at] + 1) / 2,
                                 columns + (axis.first[at] - begin) / 2 * 3);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(pixel[0], pixel[1]), low23 = _mm256_unpacklo_epi32(pixel[2], pixel[3]);
    const __m256i high01 = _mm256_unpackhi_epi32(pixel[0], pixel[1]),
                  high23 = _mm256_unpackhi_epi32(pixel[2], pixel[3]);
    const __m256i rows[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                             _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
    for (int r = 0; r < 4; ++r) {
      // Stores sixteen bytes, of which twelve count: the next pixels overwrite the rest.
      const __m256i packed = _mm256_shuffle_epi8(rows[r], drop_fourth);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[r] + 3 * x), _mm256_castsi256_si128(packed));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out[r + 4] + 3 * x), _mm256_extracti128_si256(packed, 1));
    }
  }
#else
  for (int32_t r = 0; r < kRowBlock; ++r) {
    for (int32_t x = 0; x < n_out; ++x) {
      const TapPair* pairs = axis.pairs + x * axis.pairs_stride;
      const uint8_t* pixel = in[r] + 3 * static_cast<int64_t>(axis.first[x]);
      int32_t sum[3] = {kRoundHalf, kRoundHalf, kRoundHalf};
      for (int32_t t = 0; t < axis.n_taps[x]; ++t, pixel += 3) {
        const int32_t weight = tap_weight(pairs, t);
        for (int c = 0; c < 3; ++c) sum[c] += weight * pixel[c];
      }
      for (int c = 0; c < 3; ++c) out[r][3 * x + c] = clip8(sum[c]);
    }
  }
#endif
}

REVIT_INLINE void resample_vertical_portable(const TapPair* pairs, int32_t n_taps, const uint8_t* const* taps,
                                             int64_t n_bytes, uint8_t* out) {
  constexpr int64_t kBlock = 256;
  for (int64_t begin = 0; begin < n_bytes; begin += kBlock) {
    const int64_t n = n_bytes - begin < kBlock ? n_bytes - begin : kBlock;
    int32_t sum[kBlock];
    for (int64_t i = 0; i < n; ++i) sum[i] = kRoundHalf;
    for (int32_t t = 0; t < n_taps; ++t) {
      const int32_t weight = tap_weight(pairs, t);
      const uint8_t* row = taps[t] + begin;
      for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
    }
    for (int64_t i = 0; i < n; ++i) out[begin + i] = clip8(sum[i]);
  }
}

// Writes `n_bytes` of `out`, the weighted sum of the rows `taps`. If their number is odd, `taps` has one row more.
REVIT_INLINE void resample_vertical(const TapPair* pairs, int32_t n_taps, const uint8_t* const* taps, int64_t n_bytes,
                                    uint8_t* out) {
#if REVIT_LANES >= 8
  constexpr int64_t kBlock = 32;
  if (n_bytes >= kBlock) {
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t i = 0; i < n_bytes; i += kBlock) {
      if (i > n_bytes - kBlock) i = n_bytes - kBlock;  // the last block overlaps the one before it
      SplitSum sum0, sum1, sum2, sum3;
      for (int32_t t = 0; t < n_taps; t += 2) {
        const __m256i high = broadcast_pair(pairs[t / 2].high), low = broadcast_pair(pairs[t / 2].low);
        const __m256i a = load_bytes(taps[t] + i), b = load_bytes(taps[t + 1] + i);
        const __m256i left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
        sum0.add(_mm256_unpacklo_epi8(left, zero), high, low);
        sum1.add(_mm256_unpackhi_epi8(left, zero), high, low);
        sum2.add(_mm256_unpacklo_epi8(right, zero), high, low);
        sum3.add(_mm256_unpackhi_epi8(right, zero), high, low);
      }
      const __m256i words01 = _mm256_packs_epi32(sum0.result(), sum1.result());
      const __m256i words23 = _mm256_packs_epi32(sum2.result(), sum3.result());
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_packus_epi16(words01, words23));
    }
    return;
  }
#endif
  resample_vertical_portable(pairs, n_taps, taps, n_bytes, out);
}

// Writes one row of packed RGB pixels to its place in the patch rows, each value looked up in its channel's table.
template <class T>
REVIT_INLINE void emit_row(const ResizeArgs& args, int32_t y, const uint8_t* row) {
  const int64_t patch = args.patch_size, patch_values = 3 * patch * patch;
  const T* red = static_cast<const T*>(args.table);
  const T *green = red + 256, *blue = red + 512;
  const int64_t grid_width = args.out_width / patch;
  T* out = static_cast<T*>(args.out) + y / patch * grid_width * patch_values + y % patch * patch * 3;
  for (int64_t column = 0; column < grid_width; ++column, out += patch_values) {
    T* pixel = out;
    for (int64_t x = 0; x < patch; ++x, row += 3, pixel += 3) {
      pixel[0] = red[row[0]];
      pixel[1] = green[row[1]];
      pixel[2] = blue[row[2]];
    }
  }
}

template <>
REVIT_INLINE void emit_row<uint8_t>(const ResizeArgs& args, int32_t y, const uint8_t* row) {
  const int64_t patch = args.patch_size, patch_values = 3 * patch * patch;
  const int64_t grid_width = args.out_width / patch;
  uint8_t* out = static_cast<uint8_t*>(args.out) + y / patch * grid_width * patch_values + y % patch * patch * 3;
  for (int64_t column = 0; column < grid_width; ++column, out += patch_values, row += 3 * patch) {
    __builtin_memcpy(out, row, static_cast<size_t>(3 * patch));
  }
}

// Source row `y` as packed RGB: the image's own row if it is packed and may be overrun, else a copy.
REVIT_INLINE const uint8_t* packed_row(const ResizeArgs& args, int32_t y, uint8_t* copy) {
  const uint8_t* row = args.image + y * args.stride_y;
  const int64_t bytes_after = (args.height - 1 - y) * args.stride_y;
  if (args.stride_c == 1 && args.stride_x == 3 && bytes_after >= kRowOverrun) return row;
  for (int64_t x = 0; x < args.width; ++x) {
    for (int64_t c = 0; c < 3; ++c) copy[3 * x + c] = row[x * args.stride_x + c * args.stride_c];
  }
  return copy;
}

// Layout of the scratch memory of one call.
struct ResizeScratch {
  int64_t ring_rows;
  int64_t row_bytes;
  int64_t column_bytes;

  // The ring holds the taps of an output row and the source rows that its block has in excess. Without a vertical pass,
  // rows are used in place, so the ring also holds the other output rows of a block.
  explicit ResizeScratch(const ResizeArgs& args)
      : ring_rows(args.vertical.max_taps + 2 * kRowBlock),
        row_bytes(3 * static_cast<int64_t>(args.width > args.out_width ? args.width : args.out_width) + kRowOverrun),
        column_bytes((args.width + 7) / 4 * 4 * int64_t{3 * kRowBlock * sizeof(int16_t)}) {}

  int64_t ring_offset() const { return column_bytes + 2 * ring_rows * static_cast<int64_t>(sizeof(const uint8_t*)); }
  int64_t bytes() const { return ring_offset() + (ring_rows + 3 * kRowBlock) * row_bytes; }

  const uint8_t** ring(uint8_t* scratch) const { return reinterpret_cast<const uint8_t**>(scratch + column_bytes); }
  const uint8_t** taps(uint8_t* scratch) const { return ring(scratch) + ring_rows; }
  uint8_t* row(uint8_t* scratch, int64_t index) const { return scratch + ring_offset() + index * row_bytes; }
};

int64_t resize_scratch_bytes(const ResizeArgs& args) { return ResizeScratch(args).bytes(); }

void resize_rows(const ResizeArgs& args, int32_t begin, int32_t end, uint8_t* memory) {
  const ResizeAxis &horizontal = args.horizontal, &vertical = args.vertical;
  const ResizeScratch scratch(args);
  const int64_t ring_rows = scratch.ring_rows;
  const uint8_t** const ring = scratch.ring(memory);  // [row % ring_rows]
  const uint8_t** const taps = scratch.taps(memory);
  const bool horizontal_first = !args.vertical_first && !horizontal.identity;
  const int64_t n_bytes = 3 * static_cast<int64_t>(horizontal_first ? args.out_width : args.width);

  uint8_t *copies[kRowBlock], *lines[kRowBlock], *resampled[kRowBlock];
  for (int32_t r = 0; r < kRowBlock; ++r) {
    copies[r] = scratch.row(memory, ring_rows + r);
    lines[r] = scratch.row(memory, ring_rows + kRowBlock + r);
    resampled[r] = scratch.row(memory, ring_rows + 2 * kRowBlock + r);
  }

  int32_t ready = vertical.first[begin];  // source rows before this one are in the ring, as far as they are needed
  for (int32_t y = begin; y < end; y += kRowBlock) {
    const int32_t n_lines = end - y < kRowBlock ? end - y : kRowBlock;
    const uint8_t* block[kRowBlock] = {};
    for (int32_t r = 0; r < n_lines; ++r) {
      const int32_t first = vertical.first[y + r], n_taps = vertical.n_taps[y + r];
      while (ready < first + n_taps) {
        if (!horizontal_first) {
          ring[ready % ring_rows] = packed_row(args, ready, scratch.row(memory, ready % ring_rows));
          ++ready;
          continue;
        }
        // A block that is cut short by the last row of the image repeats that row.
        const uint8_t* in[kRowBlock];
        uint8_t* out[kRowBlock];
        for (int32_t i = 0; i < kRowBlock; ++i) {
          const int32_t source = ready + i < args.height ? ready + i : args.height - 1;
          in[i] = packed_row(args, source, copies[i]);
          out[i] = scratch.row(memory, source % ring_rows);
          ring[source % ring_rows] = out[i];
        }
        resample_horizontal(horizontal, args.out_width, in, out, memory);
        ready = ready + kRowBlock < args.height ? ready + kRowBlock : args.height;
      }
      if (vertical.identity) {
        block[r] = ring[first % ring_rows];
        continue;
      }
      for (int32_t t = 0; t < n_taps; ++t) taps[t] = ring[(first + t) % ring_rows];
      taps[n_taps] = taps[n_taps - 1];
      resample_vertical(vertical.pairs + (y + r) * vertical.pairs_stride, n_taps, taps, n_bytes, lines[r]);
      block[r] = lines[r];
    }
    if (!horizontal_first && !horizontal.identity) {
      for (int32_t r = n_lines; r < kRowBlock; ++r) block[r] = block[n_lines - 1];
      resample_horizontal(horizontal, args.out_width, block, resampled, memory);
      for (int32_t r = 0; r < n_lines; ++r) block[r] = resampled[r];
    }
    for (int32_t r = 0; r < n_lines; ++r) {
      // With no horizontal pass the output may still be a crop of the row.
      const uint8_t* row = block[r] + (horizontal.identity ? 3 * static_cast<int64_t>(horizontal.first[0]) : 0);
      if (args.element_bytes == 1) {
        emit_row<uint8_t>(args, y + r, row);
      } else if (args.element_bytes == 2) {
        emit_row<uint16_t>(args, y + r, row);
      } else {
        emit_row<uint32_t>(args, y + r, row);
      }
    }
  }
}

const ResizeKernels resize_kernels = {resize_scratch_bytes, resize_rows};
