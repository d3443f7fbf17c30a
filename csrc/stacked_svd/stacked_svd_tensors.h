// What both of stacked_svd's operators on CPU tensors need: arguments, and rows in blocks.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/parallel.h"
#include "../common/tensors.h"
#include "stacked_svd_kernels.h"

namespace lora_fused {

constexpr int64_t kBlocksPerThread = 4;  // threads wait for one another twice in so many blocks

inline const SvdKernels& kernels_in_use() {
#if defined(__x86_64__)
  switch (isa_in_use()) {
    case Isa::avx512:
      return avx512::svd_kernels;
    case Isa::avx2_w16:  // every width computes the same bits
    case Isa::avx2:
      return avx2::svd_kernels;
    case Isa::generic:
      break;
  }
#endif
  return generic::svd_kernels;
}

// Float32 arguments, contiguous, of the size they must have.
struct Floats {
  OptionalTensor kept;
  const float* data = nullptr;

  Floats(const OptionalTensor& t, std::vector<int64_t> sizes, const char* name) {
    if (!t) return;
    const auto found = t->sizes();
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float &&
                        std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()),
                    "stacked_svd: ", name, " must be float32 and fit the stack");
    kept = torch::stable::contiguous(*t);
    data = static_cast<const float*>(kept->const_data_ptr());
  }
};

// Rows [first, first + rows.rows) of a layer.
struct Item {
  int64_t layer, first;
  RowBlock rows;
};

// All rows in blocks, layer after layer.
inline std::vector<Item> blocks_of(const Tensor& x, const float* mean_li) {
  const int64_t rows = x.size(1), columns = x.size(2);
  const Dtype dtype = dtype_of(x, "stacked_svd", "stack");
  std::vector<Item> items;
  for (int64_t l = 0; l < x.size(0); ++l)
    for (int64_t t = 0; t < rows; t += kRows) {
      const char* data = static_cast<const char*>(x.const_data_ptr());
      data += (l * x.stride(0) + t * x.stride(1)) * dtype_size(dtype);
      const float* mean = mean_li ? mean_li + l * columns : nullptr;
      const int64_t count = std::min(kRows, rows - t);
      items.push_back({l, t, {data, dtype, x.stride(1), x.stride(2), mean, count}});
    }
  return items;
}

}  // namespace lora_fused
