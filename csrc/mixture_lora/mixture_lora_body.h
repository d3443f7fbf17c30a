// The inner loops, written once over Vec and compiled per instruction set (see common/vec.h).
//
// Every output element is computed by one fixed sequence of operations, whatever tile it falls in:
// shrink sums blocks of kBlock columns lane by lane, adds the lanes, adds the blocks in order;
// expand adds rank row after rank row. Tiles only decide which elements share loads.
#include "../common/vec.h"
#include "mixture_lora_kernels.h"

namespace lora_fused {
namespace LF_NS {

constexpr int64_t kBlock = 1024;   // columns of one partial sum: 6 + 4 rows of 4 KiB stay in L1
constexpr int kStreamRanks = 8;    // for a single row: enough independent sums to hide latency
constexpr int kExpandDepth = 8;    // rank rows read side by side: streams a prefetcher follows
// Tiles of 6 rows by 4 vectors fill the 32 registers of AVX-512; the others have 16.
constexpr int kShrinkRows = 6;
constexpr int kShrinkRanks = LF_SIMD == 2 ? 4 : 2;
constexpr int kExpandRows = 6;
constexpr int kExpandVecs = LF_SIMD == 2 ? 4 : Vec::width == 16 ? 1 : 2;

// ---- shrink ---------------------------------------------------------------------------------

template <int R, int C, class T>
static inline void shrink_tile(const float* const* x, const void* const* a, int64_t begin,
                               int64_t end, float* const* h, int c0) {
  const float* xs[R];
  const T* as[C];
  for (int i = 0; i < R; ++i) xs[i] = x[i];
  for (int c = 0; c < C; ++c) as[c] = static_cast<const T*>(a[c]);
  Vec acc[R][C];
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) acc[i][c] = Vec::zero();
  int64_t k = begin;
  for (; k + Vec::width <= end; k += Vec::width) {
    Vec av[C];
    for (int c = 0; c < C; ++c) av[c] = Vec::load(as[c] + k);
    for (int i = 0; i < R; ++i) {
      const Vec xv = Vec::load(xs[i] + k);
      for (int c = 0; c < C; ++c) acc[i][c].fma(xv, av[c]);
    }
  }
  if (k < end) {
    const int n = int(end - k);
    Vec av[C];
    for (int c = 0; c < C; ++c) av[c] = load_part(as[c] + k, n);
    for (int i = 0; i < R; ++i) {
      const Vec xv = load_part(xs[i] + k, n);
      for (int c = 0; c < C; ++c) acc[i][c].fma(xv, av[c]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) h[i][c0 + c] += acc[i][c].sum();
}

// As many ranks per tile as fit in registers, then halves of that.
template <int R, int C, class T>
static inline void shrink_ranks(const float* const* x, const void* const* a, int ranks,
                                int64_t begin, int64_t end, float* const* h, int c) {
  for (; c + C <= ranks; c += C) shrink_tile<R, C, T>(x, a + c, begin, end, h, c);
  if constexpr (C > 1) {
    if (c < ranks) shrink_ranks<R, C / 2, T>(x, a, ranks, begin, end, h, c);
  }
}

template <class T>
static void shrink_panel(const float* const* x, int rows, const void* const* a, int ranks,
                         int64_t begin, int64_t end, float* const* h) {
  int i = 0;
  for (; i + kShrinkRows <= rows; i += kShrinkRows)
    shrink_ranks<kShrinkRows, kShrinkRanks, T>(x + i, a, ranks, begin, end, h + i, 0);
  for (; i + 2 <= rows; i += 2)
    shrink_ranks<2, 4, T>(x + i, a, ranks, begin, end, h + i, 0);
  if (i < rows) shrink_ranks<1, kStreamRanks, T>(x + i, a, ranks, begin, end, h + i, 0);
}

template <class T>
static void shrink_typed(const float* const* x, int rows, const void* const* a, int ranks,
                         int64_t n, float* const* h) {
  for (int i = 0; i < rows; ++i) __builtin_memset(h[i], 0, ranks * sizeof(float));
  if (rows <= 2) {  // nothing of x to keep in L1: read each row of A from end to end
    for (int c = 0; c < ranks; c += kStreamRanks) {
      const int width = ranks - c < kStreamRanks ? ranks - c : kStreamRanks;
      float* hs[2] = {h[0] + c, h[rows - 1] + c};
      for (int64_t k = 0; k < n; k += kBlock)
        shrink_panel<T>(x, rows, a + c, width, k, k + kBlock < n ? k + kBlock : n, hs);
    }
    return;
  }
  for (int64_t k = 0; k < n; k += kBlock)
    shrink_panel<T>(x, rows, a, ranks, k, k + kBlock < n ? k + kBlock : n, h);
}

static void shrink(const float* const* x, int rows, const void* const* a, Dtype dtype, int ranks,
                   int64_t n, float* const* h) {
  if (dtype == Dtype::f32) shrink_typed<float>(x, rows, a, ranks, n, h);
  if (dtype == Dtype::bf16) shrink_typed<bf16>(x, rows, a, ranks, n, h);
  if (dtype == Dtype::f16) shrink_typed<f16>(x, rows, a, ranks, n, h);
}

// ---- expand ---------------------------------------------------------------------------------

// R rows by C vectors in registers over the whole depth: for rows that share b.
template <int R, int C, class T>
static inline void expand_tile(float* const* y, const float* const* coef, const void* const* b,
                               int64_t depth, int64_t o, int part) {
  Vec acc[R][C];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < C; ++v) acc[i][v] = Vec::load(y[i] + o + v * Vec::width);
  for (int64_t p = 0; p < depth; ++p) {
    const T* bp = static_cast<const T*>(b[p]) + o;
    Vec bv[C];
    for (int v = 0; v < C; ++v)
      bv[v] = part ? load_part(bp, part) : Vec::load(bp + v * Vec::width);
    for (int i = 0; i < R; ++i) {
      const Vec cv = Vec::set(coef[i][p]);
      for (int v = 0; v < C; ++v) acc[i][v].fma(cv, bv[v]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < C; ++v) acc[i][v].store(y[i] + o + v * Vec::width);
}

template <int R, class T>
static void expand_rows(float* const* y, const float* const* coef, const void* const* b,
                        int64_t depth, int64_t n) {
  constexpr int64_t wide = kExpandVecs * Vec::width;
  int64_t o = 0;
  for (; o + wide <= n; o += wide) expand_tile<R, kExpandVecs, T>(y, coef, b, depth, o, 0);
  for (; o + Vec::width <= n; o += Vec::width) expand_tile<R, 1, T>(y, coef, b, depth, o, 0);
  if (o < n) expand_tile<R, 1, T>(y, coef, b, depth, o, int(n - o));
}

// One row, D rank rows at a time along their whole length: sequential reads of b.
template <int D, class T>
static inline void expand_streams(float* y, const float* coef, const void* const* b, int64_t n) {
  const T* bs[D];
  Vec cv[D];
  for (int p = 0; p < D; ++p) {
    bs[p] = static_cast<const T*>(b[p]);
    cv[p] = Vec::set(coef[p]);
  }
  int64_t o = 0;
  for (; o + Vec::width <= n; o += Vec::width) {
    Vec acc = Vec::load(y + o);
    for (int p = 0; p < D; ++p) acc.fma(cv[p], Vec::load(bs[p] + o));
    acc.store(y + o);
  }
  if (o < n) {
    Vec acc = Vec::load(y + o);
    for (int p = 0; p < D; ++p) acc.fma(cv[p], load_part(bs[p] + o, int(n - o)));
    acc.store(y + o);
  }
}

template <class T>
static void expand_typed(float* const* y, int rows, const float* const* coef,
                         const void* const* b, int64_t depth, int64_t n) {
  int i = 0;
  for (; i + kExpandRows <= rows; i += kExpandRows)
    expand_rows<kExpandRows, T>(y + i, coef + i, b, depth, n);
  for (; i + 3 <= rows; i += 3) expand_rows<3, T>(y + i, coef + i, b, depth, n);
  for (; i < rows; ++i) {
    int64_t p = 0;
    for (; p + kExpandDepth <= depth; p += kExpandDepth)
      expand_streams<kExpandDepth, T>(y[i], coef[i] + p, b + p, n);
    for (; p < depth; ++p) expand_streams<1, T>(y[i], coef[i] + p, b + p, n);
  }
}

static void expand(float* const* y, int rows, const float* const* coef, const void* const* b,
                   Dtype dtype, int64_t depth, int64_t n) {
  if (dtype == Dtype::f32) expand_typed<float>(y, rows, coef, b, depth, n);
  if (dtype == Dtype::bf16) expand_typed<bf16>(y, rows, coef, b, depth, n);
  if (dtype == Dtype::f16) expand_typed<f16>(y, rows, coef, b, depth, n);
}

// ---- conversion -----------------------------------------------------------------------------

template <class T>
static void widen_typed(const void* in, int64_t stride, float* out, int64_t n) {
  const T* p = static_cast<const T*>(in);
  if (stride != 1) {
    for (int64_t o = 0; o < n; ++o) out[o] = to_float(p[o * stride]);
    return;
  }
  int64_t o = 0;
  for (; o + Vec::width <= n; o += Vec::width) Vec::load(p + o).store(out + o);
  for (; o < n; ++o) out[o] = to_float(p[o]);
}

static void widen(const void* in, Dtype dtype, int64_t stride, float* out, int64_t n) {
  if (dtype == Dtype::f32) widen_typed<float>(in, stride, out, n);
  if (dtype == Dtype::bf16) widen_typed<bf16>(in, stride, out, n);
  if (dtype == Dtype::f16) widen_typed<f16>(in, stride, out, n);
}

template <class B, class T>
static void store_typed(const float* y, const void* base, void* out, int64_t n) {
  const B* b = static_cast<const B*>(base);
  T* t = static_cast<T*>(out);
  if (b == nullptr)
    for (int64_t o = 0; o < n; ++o) from_float(y[o], t + o);
  else
    for (int64_t o = 0; o < n; ++o) from_float(to_float(b[o]) + y[o], t + o);
}

template <class T>
static void store_as(const float* y, const void* base, Dtype base_dtype, void* out, int64_t n) {
  if (base_dtype == Dtype::f32) store_typed<float, T>(y, base, out, n);
  if (base_dtype == Dtype::bf16) store_typed<bf16, T>(y, base, out, n);
  if (base_dtype == Dtype::f16) store_typed<f16, T>(y, base, out, n);
}

static void store(const float* y, const void* base, Dtype base_dtype, void* out, Dtype dtype,
                  int64_t n) {
  if (dtype == Dtype::f32) store_as<float>(y, base, base_dtype, out, n);
  if (dtype == Dtype::bf16) store_as<bf16>(y, base, base_dtype, out, n);
  if (dtype == Dtype::f16) store_as<f16>(y, base, base_dtype, out, n);
}

extern const MixtureKernels mixture_kernels = {shrink, expand, store, widen};

}  // namespace LF_NS
}  // namespace lora_fused
