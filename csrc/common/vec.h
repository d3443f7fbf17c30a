// One float32 vector of LF_WIDTH lanes: the only code that knows an instruction set.
//
// Included by one translation unit per instruction set, inside a namespace of its own (LF_NS), so
// that no linker can merge bodies compiled for different CPUs. No std:: here for the same reason.
// Lane i of an accumulator sums the same products whatever the tile, and sum() adds lanes in one
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
  void fma(Vec a, Vec b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  float sum() const {
    const __m256 w = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
  }
};

#elif LF_SIMD == 1

struct Half8 {
  __m256 v;
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static __m256 load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static float sum(__m256 w) {
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
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
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void fma(Vec a, Vec b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  float sum() const { return Half8::sum(v); }
};
#else
struct Vec {
  static constexpr int width = 16;
  __m256 lo, hi;
  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec set(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
  template <class T>
  static Vec load(const T* p) { return {Half8::load(p), Half8::load(p + 8)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void fma(Vec a, Vec b) {
    lo = _mm256_fmadd_ps(a.lo, b.lo, lo);
    hi = _mm256_fmadd_ps(a.hi, b.hi, hi);
  }
  float sum() const { return Half8::sum(_mm256_add_ps(lo, hi)); }
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
  void store(float* p) const { __builtin_memcpy(p, v, sizeof v); }
  void fma(Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) v[i] += a.v[i] * b.v[i];
  }
  float sum() const {
    const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
    return (a + c) + (b + d);
  }
};

#endif

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
