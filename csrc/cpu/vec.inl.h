// SIMD vectors of a compile-time number of lanes on GCC/Clang vector types, with widening loads and rounding
// stores. Included once per instruction set, inside that set's own anonymous namespace (see kernels.inl.h):
// the same source becomes SSE2, AVX2 or AVX-512 code.
//
// No include guard: each translation unit includes it exactly once.

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

// Lanes of a full-width vector of the compute type T.
template <class T>
inline constexpr int kLanes = REVIT_LANES * 4 / static_cast<int>(sizeof(T));

#define REVIT_INLINE inline __attribute__((always_inline))

template <class T, int N>
REVIT_INLINE Vec<T, N> broadcast(T value) {
  return value - Vec<T, N>{};
}

REVIT_INLINE float widen(float value) { return value; }
REVIT_INLINE double widen(double value) { return value; }
REVIT_INLINE float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
// Exact, without a half-precision instruction: the exponent is rebased by a multiplication, which also
// normalises subnormals; infinities and NaNs are patched in.
REVIT_INLINE float widen(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t special = (value.bits & 0x7c00) == 0x7c00 ? 0x70000000u : 0u;
  const uint32_t scale_bits = 0x77800000u;  // 2^112
  float scale, result;
  __builtin_memcpy(&scale, &scale_bits, sizeof(scale));
  __builtin_memcpy(&result, &magnitude, sizeof(result));
  result *= scale;
  uint32_t bits;
  __builtin_memcpy(&bits, &result, sizeof(bits));
  bits = special ? (magnitude | 0x7f800000u) : bits;
  bits |= static_cast<uint32_t>(value.bits & 0x8000) << 16;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

REVIT_INLINE void narrow(float value, float* out) { *out = value; }
REVIT_INLINE void narrow(double value, double* out) { *out = value; }
REVIT_INLINE void narrow(float value, BFloat16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
REVIT_INLINE void narrow(float value, Float16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 2^16 or beyond: infinity
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: the addition of 0.5 rounds at bit 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    __builtin_memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

// N consecutive elements, unaligned, widened to the compute type.
template <int N>
REVIT_INLINE Vec<float, N> load(const float* p) {
  Vec<float, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <int N>
REVIT_INLINE Vec<double, N> load(const double* p) {
  Vec<double, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <int N>
REVIT_INLINE Vec<float, N> load(const BFloat16* p) {
#if REVIT_F16C
  if constexpr (N == 8) {  // the compiler splits the conversion of the general case in two
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<Vec<float, N>>(_mm256_slli_epi32(bits, 16));
  }
#endif
  Vec<uint16_t, N> half;
  __builtin_memcpy(&half, p, sizeof(half));
  const auto bits = __builtin_convertvector(half, Vec<uint32_t, N>) << 16;
  Vec<float, N> v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}
template <int N>
REVIT_INLINE Vec<float, N> load(const Float16* p) {
  Vec<float, N> v;
#if REVIT_F16C
  if constexpr (N % 8 == 0) {
    float lanes[N];
    for (int i = 0; i < N; i += 8) {
      _mm256_storeu_ps(lanes + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    }
    __builtin_memcpy(&v, lanes, sizeof(v));
    return v;
  }
#endif
  for (int i = 0; i < N; ++i) v[i] = widen(p[i]);
  return v;
}

template <int N>
REVIT_INLINE void store(float* p, Vec<float, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <int N>
REVIT_INLINE void store(double* p, Vec<double, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <int N>
REVIT_INLINE void store(BFloat16* p, Vec<float, N> v) {
  Vec<uint32_t, N> bits;
  __builtin_memcpy(&bits, &v, sizeof(v));
  Vec<uint32_t, N> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t, N> quiet_nan = broadcast<uint32_t, N>(0x7fc0u);
  rounded = v != v ? quiet_nan : rounded;
#if REVIT_F16C
  if constexpr (N == 8) {  // the compiler would first mask values that cannot saturate
    const __m256i wide = reinterpret_cast<__m256i>(rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
    return;
  }
#endif
  const auto half = __builtin_convertvector(rounded, Vec<uint16_t, N>);
  __builtin_memcpy(p, &half, sizeof(half));
}
template <int N>
REVIT_INLINE void store(Float16* p, Vec<float, N> v) {
#if REVIT_F16C
  if constexpr (N % 8 == 0) {
    float lanes[N];
    __builtin_memcpy(lanes, &v, sizeof(v));
    for (int i = 0; i < N; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(lanes + i), _MM_FROUND_TO_NEAREST_INT));
    }
    return;
  }
#endif
  for (int i = 0; i < N; ++i) narrow(v[i], p + i);
}

// The nearest integers, halfway the even ones; undefined for values that int32 does not hold. A multiplication that
// computes v cannot be contracted with this rounding, as it could with an addition of 1.5 * 2^23. So every instruction
// set rounds the same.
template <int N>
REVIT_INLINE Vec<int32_t, N> round_to_int(Vec<float, N> v) {
#if REVIT_AVX512
  // The mask keeps all lanes: without a mask GCC 12 warns about its own header.
  if constexpr (N == 16) return reinterpret_cast<Vec<int32_t, N>>(_mm512_maskz_cvtps_epi32(0xffff, v));
#elif REVIT_F16C
  if constexpr (N == 8) return reinterpret_cast<Vec<int32_t, N>>(_mm256_cvtps_epi32(v));
#elif defined(__x86_64__)
  if constexpr (N == 4) return reinterpret_cast<Vec<int32_t, N>>(_mm_cvtps_epi32(v));
#endif
  Vec<int32_t, N> rounded;
  for (int i = 0; i < N; ++i) rounded[i] = static_cast<int32_t>(__builtin_lrintf(v[i]));
  return rounded;
}

// Every lane is the product of the lower signed 16-bit halves plus the product of the upper ones.
template <int N>
REVIT_INLINE Vec<int32_t, N> multiply_pairs(Vec<int32_t, N> a, Vec<int32_t, N> b) {
#if REVIT_AVX512
  if constexpr (N == 16) {
    return reinterpret_cast<Vec<int32_t, N>>(
        _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
#elif REVIT_F16C
  if constexpr (N == 8) {
    return reinterpret_cast<Vec<int32_t, N>>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
#elif defined(__x86_64__)
  if constexpr (N == 4) {
    return reinterpret_cast<Vec<int32_t, N>>(
        _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
  }
#endif
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}

// Of instructions. Emulated ones are called, as inline code of dozens of them would take minutes to compile.
#if REVIT_BF16 == REVIT_EMULATED || REVIT_VNNI == REVIT_EMULATED
  #define REVIT_PRODUCT __attribute__((noinline))
#else
  #define REVIT_PRODUCT REVIT_INLINE
#endif

#if REVIT_BF16 == REVIT_EMULATED
// The float of these bits; a denormal becomes zero.
template <int N>
REVIT_INLINE Vec<float, N> flushed(Vec<int32_t, N> bits) {
  bits = (bits & 0x7f800000) == 0 ? bits & INT32_MIN : bits;
  return reinterpret_cast<Vec<float, N>>(bits);
}
#endif

#if REVIT_BF16
// sum + a b, where every 32-bit lane of a and b holds two bfloat16 values: a fused multiply-add of the upper ones, then
// one of the lower ones, each rounded to the nearest float. Denormals count as zero, in a, b and all results. This is
// vdpbf16ps, which ignores the modes of MXCSR.
template <int N>
REVIT_PRODUCT Vec<float, N> dot_pairs(Vec<float, N> sum, Vec<int32_t, N> a, Vec<int32_t, N> b) {
  #if REVIT_BF16 == REVIT_NATIVE
  static_assert(N == 16);
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  #else
  const auto step = [&](Vec<int32_t, N> x, Vec<int32_t, N> y) __attribute__((always_inline)) {
    const Vec<float, N> factor = flushed<N>(x), other = flushed<N>(y);
    Vec<float, N> result;
    for (int i = 0; i < N; ++i) result[i] = __builtin_fmaf(factor[i], other[i], sum[i]);
    sum = flushed<N>(reinterpret_cast<Vec<int32_t, N>>(result));
  };
  sum = flushed<N>(reinterpret_cast<Vec<int32_t, N>>(sum));
  step(a & static_cast<int32_t>(0xffff0000), b & static_cast<int32_t>(0xffff0000));
  step(a << 16, b << 16);
  return sum;
  #endif
}

// Rounds to bfloat16, to nearest even, for factors of dot_pairs: denormals may become zero.
template <int N>
REVIT_INLINE void store_factors(BFloat16* p, Vec<float, N> v) {
  #if REVIT_BF16 == REVIT_NATIVE
  static_assert(N == 16);
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &rounded, sizeof(rounded));
  #else
  store<N>(p, v);
  #endif
}
#endif

#if REVIT_VNNI
// sum + a b, where every 32-bit lane holds four values: unsigned bytes in a, signed ones in b. This is vpdpbusd.
template <int N>
REVIT_PRODUCT Vec<int32_t, N> dot_quads(Vec<int32_t, N> sum, Vec<int32_t, N> a, Vec<int32_t, N> b) {
  #if REVIT_VNNI == REVIT_NATIVE && REVIT_AVX512
  static_assert(N == 16);
  return (Vec<int32_t, N>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  #elif REVIT_VNNI == REVIT_NATIVE
  static_assert(N == 8);
  return (Vec<int32_t, N>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
  #else
  for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 0xff) * (b << (24 - shift) >> 24);
  return sum;
  #endif
}
#endif

// Sums the lanes by halving, in an order that is the same for every instruction set.
template <class T, int N>
REVIT_INLINE T reduce_add(Vec<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<T, N / 2> halves[2];
    __builtin_memcpy(halves, &v, sizeof(halves));
    return reduce_add<T, N / 2>(halves[0] + halves[1]);
  }
}
template <class T, int N>
REVIT_INLINE T reduce_max(Vec<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<T, N / 2> halves[2];
    __builtin_memcpy(halves, &v, sizeof(halves));
    return reduce_max<T, N / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

// total += value; the rounding error is added to `lost` (Knuth's TwoSum). C is a number or a vector.
template <class C>
REVIT_INLINE void add_exactly(C value, C* total, C* lost) {
  const C sum = *total + value;
  const C added = sum - *total;
  *lost += (*total - (sum - added)) + (value - added);
  *total = sum;
}
