// stacked_svd on CPU tensors: lora_fused::stacked_svd_fwd_native on torch's stable ABI. The schema
// is defined in lora_fused/ops/stacked_svd/registration.py, the result in reference.py.
#include "stacked_svd_tensors.h"

namespace lora_fused {
namespace {

// Philox4x32-10 (Salmon et al., SC 2011) of counter (column, block, 0) under the key `seed`.
void philox(uint64_t seed, uint64_t column, uint32_t block, uint32_t* out) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(column), c1 = uint32_t(column >> 32), c2 = block, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The test matrix [columns, padded(width)]: bit q % 32 of word q % 128 / 32 of block q / 128 of a
// column; a set bit means -1.
std::vector<float> signs(uint64_t seed, int64_t columns, int64_t width) {
  const int64_t stride = padded(width);
  std::vector<float> out(columns * stride, 0.0f);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t q = 0; q < width; q += 128) {
      uint32_t words[4];
      philox(seed, uint64_t(c), uint32_t(q / 128), words);
      const int64_t n = std::min<int64_t>(128, width - q);
      for (int64_t j = 0; j < n; ++j)
        out[c * stride + q + j] = words[j / 32] >> (j % 32) & 1 ? -1.0f : 1.0f;
    }
  return out;
}

// Scales a projected row and hands it out; what stays is weighted once more, as z's factor.
void finish_row(float* row, int64_t width, float scale, float weight, float* y) {
  for (int64_t q = 0; q < width; ++q) row[q] *= weight * scale;
  if (y) std::copy_n(row, width, y);
  for (int64_t q = 0; q < width; ++q) row[q] *= weight;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weights,
                                   const OptionalTensor& mean, const OptionalTensor& basis,
                                   const Tensor& scale, int64_t seed, int64_t sketch_width,
                                   bool want_y, bool want_z) {
  STD_TORCH_CHECK(x.dim() == 3, "stacked_svd: stack must be [L, T, I]");
  STD_TORCH_CHECK(!basis || basis->dim() == 3, "stacked_svd: basis must be [L, I, Q]");
  const SvdKernels& kernels = kernels_in_use();
  const int64_t layers = x.size(0), rows = x.size(1), columns = x.size(2);
  const int64_t width = basis ? basis->size(2) : sketch_width;
  STD_TORCH_CHECK(width > 0, "stacked_svd: width must be at least 1");
  const Floats weights_lt(weights, {layers, rows}, "weights");
  const Floats mean_li(mean, {layers, columns}, "mean");
  const Floats basis_liq(basis, {layers, columns, width}, "basis");
  const Floats scale_l(scale, {layers}, "scale");

  const int64_t stride = padded(width), room = kRows * stride + kSlack;
  const std::vector<float> drawn = basis ? std::vector<float>() : signs(seed, columns, width);
  const std::vector<Item> items = blocks_of(x, mean_li.data);
  using Sizes = std::vector<int64_t>;
  const Sizes y_size = want_y ? Sizes{layers, rows, width} : Sizes{0};
  const Sizes z_size = want_z ? Sizes{layers, width, columns} : Sizes{0};
  Tensor y = torch::stable::new_empty(x, y_size, ScalarType::Float);
  Tensor z = torch::stable::new_zeros(x, z_size, ScalarType::Float);
  float* const y_ltq = static_cast<float*>(y.mutable_data_ptr());
  float* const z_lqi = static_cast<float*>(z.mutable_data_ptr());
  const int64_t panels = (columns + kColumns - 1) / kColumns;

  // A few blocks for each thread are projected, then each thread adds all of these blocks to its columns
  // of z: blocks meet a column of z in order, however many threads there are.
  const int64_t threads = threads_for(layers * rows * columns * width);
  const int64_t at_once = threads == 1 ? 1 : kBlocksPerThread * threads;
  const int64_t group = std::min<int64_t>(at_once, items.size());
  std::vector<float> part(group * room);
  for (int64_t begin = 0; begin < int64_t(items.size()); begin += group) {
    const int64_t count = std::min<int64_t>(group, items.size() - begin);
    parallel_tasks(Sizes(count, kRows * columns * width), [&](int64_t i) {
      static thread_local std::vector<float> panel;
      panel.resize(kColumns * stride);
      const Item& item = items[begin + i];
      const Basis by = {basis ? basis_liq.data + item.layer * columns * width : drawn.data(),
                        basis ? width : stride, width};
      float* const found = part.data() + i * room;
      kernels.project(item.rows, by, columns, panel.data(), found);
      for (int64_t r = 0; r < item.rows.rows; ++r) {
        const int64_t t = item.layer * rows + item.first + r;
        finish_row(found + r * stride, width, scale_l.data[item.layer],
                   weights ? weights_lt.data[t] : 1.0f, want_y ? y_ltq + t * width : nullptr);
      }
    });
    if (!want_z) continue;
    parallel_tasks(Sizes(panels, count * kRows * kColumns * width), [&](int64_t p) {
      const int64_t first = p * kColumns;
      for (int64_t i = 0; i < count; ++i) {
        const Item& item = items[begin + i];
        kernels.add_outer(item.rows, part.data() + i * room, width, first,
                          std::min(kColumns, columns - first),
                          z_lqi + item.layer * width * columns + first, columns);
      }
    });
  }
  return {y, z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_fused, CPU, m) {
  m.impl("stacked_svd_fwd_native", TORCH_BOX(&forward));
}

}  // namespace lora_fused
