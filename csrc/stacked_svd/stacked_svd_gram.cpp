// The Gram matrix of a stack's columns: lora_fused::stacked_svd_gram_native.
#include "stacked_svd_tensors.h"

namespace lora_fused {
namespace {

constexpr int64_t kStripColumns = 48;  // of g that are one task

// g's lower triangle from its upper one, in squares that stay in cache.
void mirror(float* g, int64_t n) {
  constexpr int64_t side = 32;
  for (int64_t i = 0; i < n; i += side)
    for (int64_t j = i; j < n; j += side)
      for (int64_t c = j; c < std::min(j + side, n); ++c)
        for (int64_t r = i; r < std::min(i + side, c); ++r) g[c * n + r] = g[r * n + c];
}

// Blocks [begin, end) of rows of one layer, whose panels lie one after another.
struct Run {
  int64_t layer, begin, end;
};

std::vector<Run> runs_of(const std::vector<Item>& items, int64_t begin, int64_t end) {
  std::vector<Run> runs;
  for (int64_t i = begin; i < end; ++i) {
    if (runs.empty() || runs.back().layer != items[i].layer) runs.push_back({items[i].layer, i, i});
    runs.back().end = i + 1;
  }
  return runs;
}

void gram(Tensor g, const Tensor& x, const OptionalTensor& weights, const OptionalTensor& mean,
          const Tensor& scale, bool mirrored) {
  STD_TORCH_CHECK(x.dim() == 3, "stacked_svd: stack must be [L, T, I]");
  const SvdKernels& kernels = kernels_in_use();
  const int64_t layers = x.size(0), rows = x.size(1), columns = x.size(2);
  const Floats weights_lt(weights, {layers, rows}, "weights");
  const Floats mean_li(mean, {layers, columns}, "mean");
  const Floats scale_l(scale, {layers}, "scale");
  const Floats g_lii(g, {layers, columns, columns}, "g");
  float* const out = static_cast<float*>(g.mutable_data_ptr());
  STD_TORCH_CHECK(g_lii.data == out, "stacked_svd: g must be contiguous");

  // The factor of each row; none where all are 1.
  std::vector<float> factors(layers * rows);
  bool plain = !weights;
  for (int64_t l = 0; l < layers; ++l) {
    plain = plain && scale_l.data[l] == 1.0f;
    for (int64_t t = 0; t < rows; ++t)
      factors[l * rows + t] = scale_l.data[l] * (weights ? weights_lt.data[l * rows + t] : 1.0f);
  }
  const std::vector<Item> items = blocks_of(x, mean_li.data);
  const int64_t panels = (columns + kColumns - 1) / kColumns, room = panels * kRows * kColumns;
  const int64_t strips = (columns + kStripColumns - 1) / kStripColumns;
  const int64_t threads = threads_for(layers * rows * columns * columns / 2);
  const int64_t group = threads == 1 ? 1 : kBlocksPerThread * threads;
  std::vector<float> packed(std::min<int64_t>(group, items.size()) * room);

  // Blocks meet an element of g in order, however many threads there are.
  using Sizes = std::vector<int64_t>;
  for (int64_t begin = 0; begin < int64_t(items.size()); begin += group) {
    const int64_t count = std::min<int64_t>(group, items.size() - begin);
    parallel_tasks(Sizes(count * panels, kRows * kColumns), [&](int64_t task) {
      const int64_t i = task / panels, first = task % panels * kColumns;
      const Item& item = items[begin + i];
      kernels.pack(item.rows, plain ? nullptr : factors.data() + item.layer * rows + item.first,
                   first, std::min(kColumns, columns - first),
                   packed.data() + i * room + task % panels * kRows * kColumns);
    });
    const std::vector<Run> runs = runs_of(items, begin, begin + count);
    Sizes cost;
    for (const Run& run : runs)
      for (int64_t s = 0; s < strips; ++s)
        cost.push_back((run.end - run.begin) * kRows * kStripColumns * kStripColumns * (s + 1));
    parallel_tasks(cost, [&](int64_t task) {
      const Run& run = runs[task / strips];
      const int64_t first = task % strips * kStripColumns;
      for (int64_t i = run.begin; i < run.end; ++i)
        kernels.add_gram(packed.data() + (i - begin) * room, items[i].rows.rows, columns, first,
                         std::min(kStripColumns, columns - first),
                         out + run.layer * columns * columns);
    });
  }
  if (!mirrored) return;
  parallel_tasks(Sizes(layers, columns * columns), [&](int64_t l) {
    mirror(out + l * columns * columns, columns);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_fused, CPU, m) {
  m.impl("stacked_svd_gram_native", TORCH_BOX(&gram));
}

}  // namespace lora_fused
