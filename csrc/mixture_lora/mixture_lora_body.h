// The inner loops, written once over Vec and compiled per instruction set (see common/vec.h).
//
// Every output element is computed by one fixed sequence of operations, whatever tile it falls in:
// shrink sums blocks of kBlock columns lane by lane, adds the lanes, adds the blocks in order;
// expand sums parts of kPart rank rows of one adapter and adds part after part. Tiles only decide
// which elements share loads.
#include "../common/vec.h"
#include "mixture_lora_kernels.h"

namespace lora_fused {
namespace LF_NS {

// Columns of one partial sum: a tile's 6 + 4 rows of 4 KiB fit L1. Ranks that meet it: in L2.
constexpr int64_t kBlock = 1024;
constexpr int kShrinkGroup = 64;
constexpr int kStreamRanks = 8;    // for a single row: enough independent sums to hide latency
constexpr int kPanelSize = 4096;   // floats of a panel of b: L1, with the rows' coefficients
constexpr int kPanelRows = 4;      // fewer rows do not repay the copy
// AVX-512 has 32 registers, the others 16. Expand keeps a sum and a total of each element.
constexpr int kShrinkRows = 6;
constexpr int kShrinkRanks = LF_SIMD == 2 ? 4 : 2;
constexpr int kExpandRows = LF_SIMD == 2 ? 6 : 3;
constexpr int kExpandVecs = LF_SIMD == 1 && Vec::width == 16 ? 1 : 2;
constexpr int kPanelColumns = 64;
constexpr int kManyRows = 96;      // whose y leaves L1 before a second panel: one half as wide

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
  for (int i = 0; i < R; ++i) add_sums<C>(acc[i], h[i] + c0);
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

// Ranks [first, first + ranks) of all rows, over the columns [begin, end).
template <class T>
static void shrink_panel(const float* const* x, int rows, const void* const* a, int first,
                         int ranks, int64_t begin, int64_t end, float* const* h) {
  const int last = first + ranks;
  int i = 0;
  for (; i + kShrinkRows <= rows; i += kShrinkRows)
    shrink_ranks<kShrinkRows, kShrinkRanks, T>(x + i, a, last, begin, end, h + i, first);
  for (; i + 2 <= rows; i += 2)
    shrink_ranks<2, 4, T>(x + i, a, last, begin, end, h + i, first);
  if (i < rows) shrink_ranks<1, kStreamRanks, T>(x + i, a, last, begin, end, h + i, first);
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
        shrink_panel<T>(x, rows, a + c, 0, width, k, k + kBlock < n ? k + kBlock : n, hs);
    }
    return;
  }
  for (int64_t k = 0; k < n; k += kBlock)
    for (int c = 0; c < ranks; c += kShrinkGroup) {
      const int width = ranks - c < kShrinkGroup ? ranks - c : kShrinkGroup;
      shrink_panel<T>(x, rows, a, c, width, k, k + kBlock < n ? k + kBlock : n, h);
    }
}

static void shrink(const float* const* x, int rows, const void* const* a, Dtype dtype, int ranks,
                   int64_t n, float* const* h) {
  if (dtype == Dtype::f32) shrink_typed<float>(x, rows, a, ranks, n, h);
  if (dtype == Dtype::bf16) shrink_typed<bf16>(x, rows, a, ranks, n, h);
  if (dtype == Dtype::f16) shrink_typed<f16>(x, rows, a, ranks, n, h);
}

// ---- expand ---------------------------------------------------------------------------------

// W columns of b, rank rows side by side: they lie a power of two apart in memory, so that in place
// they would fall into a few sets of the L1 cache.
template <int W, class T>
static void load_panel(const void* const* b, int depth, int64_t o, int n, float* panel) {
  for (int p = 0; p < depth; ++p) {
    const T* row = static_cast<const T*>(b[p]) + o;
    for (int v = 0; v < n; v += Vec::width) {
      const Vec part = n - v < Vec::width ? load_part(row + v, n - v) : Vec::load(row + v);
      part.store(panel + p * W + v);
    }
  }
}

// R rows by C vectors in registers. Each part is summed from zero and then added: chains stay short
// and do not depend on what else is in the panel.
template <int R, int C, int W>
static inline void expand_tile(float* const* y, const float* const* coef, const float* panel,
                               int64_t first, const int32_t* ends, int parts, int64_t o,
                               bool fresh) {
  const float* cs[R];
  for (int i = 0; i < R; ++i) cs[i] = coef[i];
  Vec total[R][C];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < C; ++v)
      total[i][v] = fresh ? Vec::zero() : Vec::load(y[i] + o + v * Vec::width);
  int64_t p = first;
  for (int part = 0; part < parts; ++part) {
    Vec acc[R][C];
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < C; ++v) acc[i][v] = Vec::zero();
    for (; p < ends[part]; ++p, panel += W) {
      Vec bv[C];
      for (int v = 0; v < C; ++v) bv[v] = Vec::load(panel + v * Vec::width);
      for (int i = 0; i < R; ++i) {
        const Vec cv = Vec::set(cs[i][p]);
        for (int v = 0; v < C; ++v) acc[i][v].fma(cv, bv[v]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < C; ++v) total[i][v].add(acc[i][v]);
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < C; ++v) total[i][v].store(y[i] + o + v * Vec::width);
}

// C vectors of columns, all rows.
template <int C, int W>
static void expand_columns(float* const* y, int rows, const float* const* coef,
                           const float* panel, int64_t first, const int32_t* ends, int parts,
                           int64_t o, bool fresh) {
  int i = 0;
  for (; i + kExpandRows <= rows; i += kExpandRows)
    expand_tile<kExpandRows, C, W>(y + i, coef + i, panel, first, ends, parts, o, fresh);
  for (; i < rows; ++i) expand_tile<1, C, W>(y + i, coef + i, panel, first, ends, parts, o, fresh);
}

template <int W, class T>
static void expand_panels(float* const* y, int rows, const float* const* coef,
                          const void* const* b, const int32_t* ends, int parts, int64_t n,
                          bool fresh) {
  constexpr int step = kExpandVecs * Vec::width;
  constexpr int most = kPanelSize / W;
  float panel[kPanelSize];
  for (int64_t o = 0; o < n; o += W) {
    const int width = n - o < W ? int(n - o) : W;
    int64_t first = 0;
    for (int part = 0, next; part < parts; part = next) {  // as many parts as a panel holds
      for (next = part + 1; next < parts && ends[next] - first <= most;) ++next;
      const int depth = int(ends[next - 1] - first);
      load_panel<W, T>(b + first, depth, o, width, panel);
      int v = 0;
      for (; v + step <= width; v += step)
        expand_columns<kExpandVecs, W>(y, rows, coef, panel + v, first, ends + part,
                                       next - part, o + v, fresh && part == 0);
      for (; v < width; v += Vec::width)
        expand_columns<1, W>(y, rows, coef, panel + v, first, ends + part, next - part, o + v,
                             fresh && part == 0);
      first = ends[next - 1];
    }
  }
}

// One row, D rank rows at a time along their whole length: sequential reads of b.
template <int D, class T>
static inline void expand_streams(float* y, const float* coef, const void* const* b, int64_t n,
                                  bool fresh) {
  const T* bs[D];
  Vec cv[D];
  for (int p = 0; p < D; ++p) {
    bs[p] = static_cast<const T*>(b[p]);
    cv[p] = Vec::set(coef[p]);
  }
  for (int64_t o = 0; o < n; o += Vec::width) {
    const bool whole = o + Vec::width <= n;
    Vec acc = Vec::zero(), total = fresh ? Vec::zero() : Vec::load(y + o);
    for (int p = 0; p < D; ++p)
      acc.fma(cv[p], whole ? Vec::load(bs[p] + o) : load_part(bs[p] + o, int(n - o)));
    total.add(acc);
    total.store(y + o);
  }
}

template <int D, class T>
static void expand_part(float* y, const float* coef, const void* const* b, int depth, int64_t n,
                        bool fresh) {
  if (depth == D) return expand_streams<D, T>(y, coef, b, n, fresh);
  if constexpr (D > 1) expand_part<D - 1, T>(y, coef, b, depth, n, fresh);
}

template <class T>
static void expand_typed(float* const* y, int rows, const float* const* coef,
                         const void* const* b, const int32_t* ends, int parts, int64_t n,
                         bool fresh) {
  constexpr int W = kPanelColumns;
  if (rows >= kManyRows && parts > 0 && ends[parts - 1] > kPanelSize / W)
    return expand_panels<W / 2, T>(y, rows, coef, b, ends, parts, n, fresh);
  if (rows >= kPanelRows) return expand_panels<W, T>(y, rows, coef, b, ends, parts, n, fresh);
  for (int i = 0; i < rows; ++i)
    for (int part = 0, p = 0; part < parts; p = ends[part++])
      expand_part<kPart, T>(y[i], coef[i] + p, b + p, ends[part] - p, n, fresh && part == 0);
}

static void expand(float* const* y, int rows, const float* const* coef, const void* const* b,
                   Dtype dtype, const int32_t* ends, int parts, int64_t n, bool fresh) {
  if (dtype == Dtype::f32) expand_typed<float>(y, rows, coef, b, ends, parts, n, fresh);
  if (dtype == Dtype::bf16) expand_typed<bf16>(y, rows, coef, b, ends, parts, n, fresh);
  if (dtype == Dtype::f16) expand_typed<f16>(y, rows, coef, b, ends, parts, n, fresh);
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
  int64_t o = 0;
  for (; o + Vec::width <= n; o += Vec::width) {
    Vec sum = Vec::load(y + o);
    if (b) sum.add(Vec::load(b + o));
    sum.store(t + o);
  }
  for (; o < n; ++o) from_float(b ? y[o] + to_float(b[o]) : y[o], t + o);
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
