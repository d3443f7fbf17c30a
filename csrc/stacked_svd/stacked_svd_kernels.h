// The products of stacked_svd's passes, as one table of functions per instruction set.
#pragma once

#include "../common/dtype.h"
#include "../common/isa.h"

namespace lora_fused {

// Rows of one layer: m[r][c] = x[r][c] - mean[c], r < rows <= kRows.
struct RowBlock {
  const char* x;
  Dtype dtype;
  int64_t stride_row, stride_col;  // in elements
  const float* mean;               // or null
  int64_t rows;
};

// Floats of a row of y in scratch: whole vectors.
inline int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// What the rows are multiplied by: [columns, width], rows `stride` apart.
struct Basis {
  const float* data;
  int64_t stride, width;
};

// Rows of a block: fixed, so that sums do not depend on threads. A multiple of kTileRows.
constexpr int64_t kRows = 96;
constexpr int64_t kTileRows = 24;
constexpr int64_t kColumns = 96;   // of a panel: the length of a partial sum of y
constexpr int64_t kSlack = 16;     // floats beyond y that may be read

struct SvdKernels {
  // y[r][q] = sum_c m[r][c] * basis[c][q]; y has kRows rows of padded(width), and kSlack.
  // `panel` is scratch of kColumns * padded(width).
  void (*project)(const RowBlock& rows, const Basis& basis, int64_t columns, float* panel,
                  float* y);
  // z[q][c] += sum_r y[r][q] * m[r][c] for `count` columns from `first` on, at most kColumns.
  void (*add_outer)(const RowBlock& rows, const float* y, int64_t width, int64_t first,
                    int64_t count, float* z, int64_t z_stride);
  // Panel [kRows][kColumns] of `count` columns from `first` on, each row times its factor.
  void (*pack)(const RowBlock& rows, const float* factors, int64_t first, int64_t count,
               float* panel);
  // g[i][j] += sum_r m[r][i] * m[r][j] for `count` columns j from `first` on, of one panel, and all
  // i <= j, from panels as pack makes them; a few i > j as well. g is [columns, columns].
  void (*add_gram)(const float* panels, int64_t rows, int64_t columns, int64_t first,
                   int64_t count, float* g);
};
static_assert(kRows % kTileRows == 0, "y has room for whole tiles");

// One definition per stacked_svd_<isa>.cpp.
namespace generic { extern const SvdKernels svd_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const SvdKernels svd_kernels; }
namespace avx512 { extern const SvdKernels svd_kernels; }
#endif

}  // namespace lora_fused
