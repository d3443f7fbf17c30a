// One float32 vector of LF_WIDTH lanes: the only code that knows an instruction set.
//
// Included by one translation unit per instruction set, inside a namespace of its own (LF_NS), so
// that no linker can merge bodies compiled for different CPUs. No std:: here for the same reason.
// Lane i of an accumulator sums the same products whatever the tile, and add_sums adds lanes in one
// fixed tree: this is what makes a row's result independent of its batch.
#include "dtype.h"

#if LF_SIMD > 0
#include <immintrin.h>
#endif

namespace lora_fused {
namespace LF_NS {

static inline float to_float(float v) { return v; }
static inline float to_float(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
static inline float to_float(f16 v) {
  _Float16 half;
  __builtin_memcpy(&half, &v.bits, 2);
  return float(half);
}

static inline void from_float(float v, float* out) { *out = v; }
static inline void from_float(float v, f16* out) {
  const _Float16 half = _Float16(v);
  __builtin_memcpy(&out->bits, &half, 2);
}
static inline void from_float(float v, bf16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(v != v ? (bits >> 16) | 0x40u : rounded);
}

#if LF_SIMD > 0

// Sums of four vectors at once, each in sum_lanes' order: (q0 + q2) + (q1 + q3).
static inline __m128 sum_quads(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}
static inline __m128 quads(__m256 w) {
  return _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
}
static inline float sum_lanes(__m128 q) {
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

#endif
#if LF_SIMD == 2

struct Vec {
  static constexpr int width = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float s) { return {_mm512_set1_ps(s)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bf16_bits(_mm512_castps_si512(v))));
  }
  void store(f16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void fma(Vec a, Vec b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  void add(Vec a) { v = _mm512_add_ps(v, a.v); }
  __m512i bf16_bits(__m512i bits) const {  // from_float, lane by lane
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
  }
  __m128 quarters() const {
    return quads(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }
};

#elif LF_SIMD == 1

struct Half8 {
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static __m256 load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void store(__m256 v, float* p) { _mm256_storeu_ps(p, v); }
  static void store(__m256 v, f16* p) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(__m256 v, bf16* p) {  // from_float, lane by lane
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
};

#if LF_WIDTH == 8
struct Vec {
  static constexpr int width = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float s) { return {_mm256_set1_ps(s)}; }
  template <class T>
  static Vec load(const T* p) { return {Half8::load(p)}; }
  template <class T>
  void store(T* p) const { Half8::store(v, p); }
  void fma(Vec a, Vec b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  void add(Vec a) { v = _mm256_add_ps(v, a.v); }
  __m128 quarters() const { return quads(v); }
};
#else
struct Vec {
  static constexpr int width = 16;
  __m256 lo, hi;
  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec set(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
  template <class T>
  static Vec load(const T* p) { return {Half8::load(p), Half8::load(p + 8)}; }
  template <class T>
  void store(T* p) const {
    Half8::store(lo, p);
    Half8::store(hi, p + 8);
  }
  void add(Vec a) {
    lo = _mm256_add_ps(lo, a.lo);
    hi = _mm256_add_ps(hi, a.hi);
  }
  void fma(Vec a, Vec b) {
    lo = _mm256_fmadd_ps(a.lo, b.lo, lo);
    hi = _mm256_fmadd_ps(a.hi, b.hi, hi);
  }
  __m128 quarters() const { return quads(_mm256_add_ps(lo, hi)); }
};
#endif

#else

struct Vec {
  static constexpr int width = 8;
  float v[8];
  static Vec zero() { return set(0.0f); }
  static Vec set(float s) { return {{s, s, s, s, s, s, s, s}}; }
  template <class T>
  static Vec load(const T* p) {
    Vec out;
    for (int i = 0; i < 8; ++i) out.v[i] = to_float(p[i]);
    return out;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 8; ++i) from_float(v[i], p + i);
  }
  void add(Vec a) {
    for (int i = 0; i < 8; ++i) v[i] += a.v[i];
  }
  void fma(Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) v[i] += a.v[i] * b.v[i];
  }
  float sum() const {
    const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
    return (a + c) + (b + d);
  }
};

#endif

// out[c] += sum of acc[c]'s lanes, for c < C: the same additions for every C.
template <int C>
static inline void add_sums(const Vec* acc, float* out) {
#if LF_SIMD > 0
  if constexpr (C % 4 == 0) {
    for (int c = 0; c < C; c += 4) {
      const __m128 sums = sum_quads(acc[c].quarters(), acc[c + 1].quarters(),
                                    acc[c + 2].quarters(), acc[c + 3].quarters());
      _mm_storeu_ps(out + c, _mm_add_ps(_mm_loadu_ps(out + c), sums));
    }
  } else {
    for (int c = 0; c < C; ++c) out[c] += sum_lanes(acc[c].quarters());
  }
#else
  for (int c = 0; c < C; ++c) out[c] += acc[c].sum();
#endif
}

// out[j][i] = in[i][j], 4 by 4.
static inline void turn4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if LF_SIMD > 0
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + in_stride);
  __m128 c = _mm_loadu_ps(in + 2 * in_stride), d = _mm_loadu_ps(in + 3 * in_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + out_stride, b);
  _mm_storeu_ps(out + 2 * out_stride, c);
  _mm_storeu_ps(out + 3 * out_stride, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

// The first n lanes from memory, the others zero; n < width.
template <class T>
static inline Vec load_part(const T* p, int n) {
  T lanes[Vec::width];
  __builtin_memset(lanes, 0, sizeof lanes);
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return Vec::load(lanes);
}

}  // namespace LF_NS
}  // namespace lora_fused
