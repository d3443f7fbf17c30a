// The inner loops, written once over Vec and compiled per instruction set (see common/vec.h).
//
// Each output element is one chain of multiply-adds per panel (y) or block of rows (z), from zero,
// and the chains are added in order: lanes never meet, so every width computes the same bits.
#include "../common/vec.h"
#include "stacked_svd_kernels.h"

namespace lora_fused {
namespace LF_NS {

// Vectors of a tile's sums: AVX-512 has 32 registers, the others 16.
constexpr int kSums = LF_SIMD == 2 ? 24 : LF_SIMD == 1 ? 12 : 6;
constexpr int kVecs = 3;
constexpr int kStrip = kVecs * Vec::width;
static_assert(kTileRows % kSums == 0 && kSums % (2 * kVecs) == 0, "whole tiles of rows");
static_assert(kColumns % kStrip == 0, "whole strips");

// out[i][j] += sum_k a[i * A + k * a_step] * b[k * b_step + j], R x V vectors of it.
template <int R, int V, int64_t A>
static inline void add_tile(const float* a, int64_t a_step, const float* b, int64_t b_step,
                            int64_t depth, float* out, int64_t out_stride) {
  Vec acc[R][V];
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = Vec::zero();
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Vec bv[V];
    for (int v = 0; v < V; ++v) bv[v] = Vec::load(b + v * Vec::width);
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i) {
      const Vec av = Vec::set(a[i * A]);
      for (int v = 0; v < V; ++v) acc[i][v].fma(av, bv[v]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      float* const to = out + i * out_stride + v * Vec::width;
      Vec sum = Vec::load(to);
      sum.add(acc[i][v]);
      sum.store(to);
    }
}

template <class T>
static inline void widen(const T* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) Vec::load(in + i).store(out + i);
  if (i < n) load_part(in + i, int(n - i)).store(out + i);
}

// A turned stack, whose rows are adjacent: four columns at a time by way of scratch.
template <class T>
static void load_turned(const T* x, int64_t stride_col, int64_t n_rows, int64_t n, float* m) {
  constexpr int64_t ahead = 8, stride = kRows;
  alignas(64) float columns[4 * stride];
  for (int64_t c = 0; c < n; c += 4) {
    for (int64_t j = 0; j < 4 && c + j < n; ++j) {
      const T* const column = x + (c + j) * stride_col;
      widen(column, n_rows, columns + j * stride);
      for (int64_t p = 0; p < n_rows; p += int64_t(64 / sizeof(T)))
        __builtin_prefetch(column + ahead * stride_col + p);
    }
    for (int64_t r = 0; r < n_rows; r += 4)
      turn4(columns + r, stride, m + r * kColumns + c, kColumns);
  }
}

// m[r][c] of rows [r0, r0 + n_rows) and columns [c0, c0 + n) as float32, kColumns apart. What lies
// beside them in m is overwritten.
template <class T>
static void load_rows(const RowBlock& block, int64_t r0, int64_t n_rows, int64_t c0, int64_t n,
                      float* m) {
  const T* x = reinterpret_cast<const T*>(block.x) + r0 * block.stride_row + c0 * block.stride_col;
  if (block.stride_col == 1) {
    for (int64_t r = 0; r < n_rows; ++r, x += block.stride_row) {
      widen(x, n, m + r * kColumns);
      for (int64_t p = 0; p < kColumns; p += int64_t(64 / sizeof(T)))
        __builtin_prefetch(x + kColumns + p);
    }
  } else if (block.stride_row == 1) {
    load_turned(x, block.stride_col, n_rows, n, m);
  } else {
    for (int64_t c = 0; c < n; ++c)
      for (int64_t r = 0; r < n_rows; ++r)
        m[r * kColumns + c] = to_float(x[r * block.stride_row + c * block.stride_col]);
  }
  for (int64_t r = 0; block.mean && r < n_rows; ++r)
    for (int64_t c = 0; c < n; ++c) m[r * kColumns + c] -= block.mean[c0 + c];
}

static void load(const RowBlock& block, int64_t r0, int64_t n_rows, int64_t c0, int64_t n,
                 float* m) {
  if (block.dtype == Dtype::f32) load_rows<float>(block, r0, n_rows, c0, n, m);
  if (block.dtype == Dtype::bf16) load_rows<bf16>(block, r0, n_rows, c0, n, m);
  if (block.dtype == Dtype::f16) load_rows<f16>(block, r0, n_rows, c0, n, m);
}

// `n` rows of the basis as vectors: in place where they are whole vectors, else copied to `panel`.
static const float* load_basis(const Basis& basis, int64_t c0, int64_t n, float* panel) {
  const float* row = basis.data + c0 * basis.stride;
  const int64_t stride = padded(basis.width);
  if (basis.stride == stride) return row;
  const int64_t last = basis.width - Vec::width;  // where the last whole vector begins
  for (int64_t k = 0; k < n; ++k, row += basis.stride) {
    float* const out = panel + k * stride;
    for (int64_t q = 0; q < last; q += Vec::width) Vec::load(row + q).store(out + q);
    if (last >= 0) Vec::load(row + last).store(out + last);
    for (int64_t q = 0; last < 0 && q < basis.width; ++q) out[q] = row[q];
  }
  return panel;
}

// V vectors of columns of y, all rows of a tile.
template <int V>
static inline void add_columns(const float* m, int64_t rows, const float* basis, int64_t stride,
                               int64_t n, float* y) {
  constexpr int R = kSums / V;
  for (int64_t r = 0; r < rows; r += R)
    add_tile<R, V, kColumns>(m + r * kColumns, 1, basis, stride, n, y + r * stride, stride);
}

static void project(const RowBlock& block, const Basis& basis, int64_t columns, float* panel,
                    float* y) {
  const int64_t stride = padded(basis.width);
  alignas(64) float m[kRows * kColumns];
  __builtin_memset(m, 0, sizeof m);  // a tile may read rows that are not there
  // Tile by tile, which stays in L1; but columns of a turned stack in runs as long as there are.
  const int64_t step = block.stride_col == 1 ? kTileRows : kRows;
  __builtin_memset(y, 0, kRows * stride * sizeof(float));
  for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
    const int64_t n = columns - c0 < kColumns ? columns - c0 : kColumns;
    const float* const b = load_basis(basis, c0, n, panel);
    for (int64_t r0 = 0; r0 < block.rows; r0 += step) {
      const int64_t rows = block.rows - r0 < step ? block.rows - r0 : step;
      load(block, r0, rows, c0, n, m);
      float* const out = y + r0 * stride;
      int64_t q = 0;
      // Four vectors that remain are two pairs, for a single one reads m for each multiply-add.
      for (; q + kStrip <= stride && q + kStrip + Vec::width != stride; q += kStrip)
        add_columns<kVecs>(m, rows, b + q, stride, n, out + q);
      for (; q + 2 * Vec::width <= stride; q += 2 * Vec::width)
        add_columns<2>(m, rows, b + q, stride, n, out + q);
      if (q < stride) add_columns<1>(m, rows, b + q, stride, n, out + q);
    }
  }
}

// R rows of a strip of z; where fewer rows or columns are left, by way of scratch.
template <int R>
static inline void add_strip(const float* y, int64_t stride, const float* m, int64_t depth,
                             int64_t rows, int64_t columns, float* z, int64_t z_stride) {
  if (rows >= R && columns >= kStrip)
    return add_tile<R, kVecs, 1>(y, stride, m, kColumns, depth, z, z_stride);
  alignas(64) float edge[R * kStrip] = {};
  add_tile<R, kVecs, 1>(y, stride, m, kColumns, depth, edge, kStrip);
  for (int64_t i = 0; i < R && i < rows; ++i)
    for (int64_t j = 0; j < kStrip && j < columns; ++j) z[i * z_stride + j] += edge[i * kStrip + j];
}

static void add_outer(const RowBlock& block, const float* y, int64_t width, int64_t first,
                      int64_t count, float* z, int64_t z_stride) {
  constexpr int R = kSums / kVecs;
  const int64_t stride = padded(width);
  alignas(64) float m[kRows * kColumns];
  if (count < kColumns) __builtin_memset(m, 0, sizeof m);  // a strip may read beyond
  load(block, 0, block.rows, first, count, m);
  for (int64_t c = 0; c < count; c += kStrip)
    for (int64_t q = 0; q < width; q += R) {
      const auto add = width - q > R / 2 ? add_strip<R> : add_strip<R / 2>;
      add(y + q, stride, m + c, block.rows, width - q, count - c, z + q * z_stride + c, z_stride);
    }
}

static void pack(const RowBlock& block, const float* factors, int64_t first, int64_t count,
                 float* panel) {
  if (count < kColumns) __builtin_memset(panel, 0, kRows * kColumns * sizeof(float));
  load(block, 0, block.rows, first, count, panel);
  for (int64_t r = 0; factors && r < block.rows; ++r) {
    float* const row = panel + r * kColumns;
    for (int64_t c = 0; c < kColumns; ++c) row[c] *= factors[r];
  }
}

// V vectors of columns of g, rows [i, i + R); where it ends before them, by way of scratch.
template <int R, int V>
static inline void add_gram_tile(const float* a, const float* b, int64_t depth, int64_t rows,
                                 int64_t columns, float* g, int64_t stride) {
  if (rows >= R && columns >= V * Vec::width)
    return add_tile<R, V, 1>(a, kColumns, b, kColumns, depth, g, stride);
  constexpr int64_t width = V * Vec::width;
  alignas(64) float edge[R * width] = {};
  add_tile<R, V, 1>(a, kColumns, b, kColumns, depth, edge, width);
  for (int64_t i = 0; i < R && i < rows; ++i)
    for (int64_t j = 0; j < width && j < columns; ++j) g[i * stride + j] += edge[i * width + j];
}

static void add_gram(const float* panels, int64_t rows, int64_t columns, int64_t first,
                     int64_t count, float* g) {
  constexpr int64_t R = kSums / kVecs, W = Vec::width, panel = kRows * kColumns;
  static_assert(W % R == 0 && kColumns % R == 0, "a tile's rows lie in one vector, in one panel");
  const float* const own = panels + first / kColumns * panel + first % kColumns;
  for (int64_t c = 0; c < count; c += kStrip) {
    const int64_t end = count - c < kStrip ? count - c : kStrip;  // of the strip
    for (int64_t i = 0; i < first + c + end; i += R) {
      const int64_t skip = i > first + c ? (i - first - c) / W * W : 0;  // wholly below the diagonal
      const float* const a = panels + i / kColumns * panel + i % kColumns;
      const int64_t left = end - skip;
      const auto add = left > 2 * W ? add_gram_tile<R, 3> : left > W ? add_gram_tile<R, 2>
                                                                     : add_gram_tile<R, 1>;
      add(a, own + c + skip, rows, columns - i, left, g + i * columns + first + c + skip, columns);
    }
  }
}

extern const SvdKernels svd_kernels = {project, add_outer, pack, add_gram};

}  // namespace LF_NS
}  // namespace lora_fused
