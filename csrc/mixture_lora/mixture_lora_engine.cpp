#include "mixture_lora_engine.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace lora_fused {
namespace {

constexpr int64_t kRowChunk = 48;   // rows of a shrink task: their block of x stays in L2
constexpr int64_t kRankChunk = 64;  // ranks of a shrink task
constexpr int64_t kRoom = 1 << 17;  // floats of a thread's output block: half of a 1 MiB L2

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch that outlives a call: a decode step is shorter than the page faults of fresh memory.
template <class T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// Pointers to rank rows [first, first + n) of adapter k from column o on; rows whose columns are
// not adjacent are first widened into scratch, `width` columns of them.
struct RankRows {
  std::vector<const void*> pointers;
  std::vector<float> widened;
  Dtype dtype;

  const void* const* load(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                          int64_t k, int64_t first, int64_t n, int64_t o, int64_t width) {
    const void** p = scratch(pointers, n);
    dtype = side.stride_col == 1 ? side.dtype : Dtype::f32;
    const int64_t offset = o * side.stride_col * dtype_size(side.dtype);
    float* copy = side.stride_col == 1 ? nullptr : scratch(widened, n * width);
    for (int64_t r = 0; r < n; ++r) {
      p[r] = stack.at(side, k, first + r) + offset;
      if (!copy) continue;
      kernels.widen(p[r], side.dtype, side.stride_col, copy + r * width, width);
      p[r] = copy + r * width;
    }
    return p;
  }
};

void sort_by_adapter(const std::vector<uint64_t>& keys, int64_t count, std::vector<uint64_t>& out) {
  // Keys are (adapter, pair) with pairs ascending; counting is linear and stable.
  if (count > 8 * int64_t(keys.size()) + 64) {
    out = keys;
    std::sort(out.begin(), out.end());
    return;
  }
  static thread_local std::vector<int32_t> place;
  place.assign(count + 1, 0);
  for (const uint64_t key : keys) ++place[(key >> 32) + 1];
  for (int64_t k = 0; k < count; ++k) place[k + 1] += place[k];
  out.resize(keys.size());
  for (const uint64_t key : keys) out[place[key >> 32]++] = key;
}

}  // namespace

void make_plan(const Stack& stack, const Route& route, int64_t first_row, int64_t last_row,
               Plan& plan) {
  static thread_local std::vector<uint64_t> keys, sorted;
  keys.clear();
  const int64_t per_row = route.per_row;
  for (int64_t n = first_row; n < last_row; ++n) {
    const int64_t m = route.mixture(n);
    STD_TORCH_CHECK(m >= 0 && m < route.mixtures, "mixture_lora: row_mixture must lie in [0, ",
                    route.mixtures - 1, "], got ", m);
    for (int64_t j = 0; j < per_row; ++j) {
      const int64_t k = route.adapter_ids[m * per_row + j];
      STD_TORCH_CHECK(k >= -1 && k < stack.count, "mixture_lora: adapter_ids must lie in [-1, ",
                      stack.count - 1, "], got ", k);
      if (k >= 0) keys.push_back(uint64_t(k) << 32 | uint64_t((n - first_row) * per_row + j));
    }
  }
  sort_by_adapter(keys, stack.count, sorted);

  const int64_t pairs = int64_t(sorted.size());
  plan.first_row = first_row;
  plan.last_row = last_row;
  plan.row.resize(pairs);
  plan.index.resize(pairs);
  plan.factor.resize(pairs);
  plan.segments.clear();
  plan.h_size = 0;
  for (int64_t p = 0; p < pairs;) {
    const int64_t k = int64_t(sorted[p] >> 32), rank = stack.rank(k);
    const bool fits = rank >= 0 && (stack.row_start ? stack.row_start[k] >= 0 &&
                                        stack.first_row(k) + rank <= stack.rows
                                                    : rank <= stack.max_rank);
    STD_TORCH_CHECK(fits, "mixture_lora: row_start or ranks must lie within the stack, got rank ",
                    rank, " for adapter ", k);
    const int64_t begin = p;
    const float scale = route.scale ? route.scale[k] : 1.0f;
    for (; p < pairs && int64_t(sorted[p] >> 32) == k; ++p) {
      const int64_t pair = int64_t(sorted[p] & 0xffffffffu), local = pair / per_row;
      const int64_t m = route.mixture(first_row + local);
      plan.row[p] = int32_t(local);
      plan.index[p] = int32_t(first_row * per_row + pair);
      plan.factor[p] = route.weights[m * per_row + pair % per_row] * scale;
    }
    if (rank > 0) plan.segments.push_back({k, rank, begin, p, plan.h_size});
    plan.h_size += (p - begin) * rank;
  }
}

void shrink_rows(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                 const Plan& plan, const Rows& rows, bool weighted, float* h) {
  struct Task {
    const Segment* segment;
    int64_t begin, end, rank, ranks;
  };
  int64_t cost = 0;
  for (const Segment& s : plan.segments) cost += (s.end - s.begin) * s.rank * side.columns;
  // Few rows: pieces small enough that every thread gets some.
  const int64_t threads = threads_for(cost);
  const int64_t limit = threads == 1 ? kRankChunk : std::max<int64_t>(8, std::min<int64_t>(
      kRankChunk, cost / (4 * threads * side.columns) / 8 * 8));
  std::vector<Task> tasks;
  std::vector<int64_t> costs;
  for (const Segment& s : plan.segments)
    for (int64_t p = s.begin; p < s.end; p += kRowChunk)
      for (int64_t r = 0; r < s.rank; r += limit) {
        tasks.push_back({&s, p, std::min(p + kRowChunk, s.end), r, std::min(limit, s.rank - r)});
        costs.push_back((tasks.back().end - p) * tasks.back().ranks * side.columns);
      }
  parallel_tasks(costs, [&](int64_t t) {
    static thread_local RankRows source;
    const Task& task = tasks[t];
    const Segment& s = *task.segment;
    const void* const* a = source.load(kernels, stack, side, s.adapter, task.rank, task.ranks, 0,
                                       side.columns);
    const float* x[kRowChunk];
    float* out[kRowChunk];
    const int count = int(task.end - task.begin);
    for (int i = 0; i < count; ++i) {
      const int64_t p = task.begin + i;
      x[i] = rows.at(plan.first_row + plan.row[p]);
      out[i] = h + s.h + (p - s.begin) * s.rank + task.rank;
    }
    kernels.shrink(x, count, a, source.dtype, int(task.ranks), side.columns, out);
    if (!weighted) return;
    for (int i = 0; i < count; ++i)
      for (int64_t r = 0; r < task.ranks; ++r) out[i][r] *= plan.factor[task.begin + i];
  });
}

void expand_rows(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                 const Plan& plan, const float* coef, const Output& output) {
  const int64_t count = plan.last_row - plan.first_row;
  if (count == 0 || side.columns == 0) return;
  const int64_t cost = plan.h_size * side.columns;
  const int64_t share = (side.columns + threads_for(cost) - 1) / threads_for(cost);
  const int64_t width = round_up(
      std::max<int64_t>(64, std::min(share, kRoom / count / 64 * 64)), 64);
  const int64_t blocks = (side.columns + width - 1) / width;
  const std::vector<int64_t> costs(blocks, cost / blocks + 1);
  parallel_tasks(costs, [&](int64_t t) {
    static thread_local std::vector<float> room;
    static thread_local std::vector<float*> y;
    static thread_local std::vector<const float*> c;
    static thread_local RankRows source;
    const int64_t o = t * width, n = std::min(width, side.columns - o);
    float* acc = scratch(room, count * width);
    for (int64_t i = 0; i < count; ++i)
      std::memset(acc + i * width, 0, round_up(n, kPadColumns) * sizeof(float));
    for (const Segment& s : plan.segments) {
      const int64_t pairs = s.end - s.begin;
      const void* const* b = source.load(kernels, stack, side, s.adapter, 0, s.rank, o, n);
      float** ys = scratch(y, pairs);
      const float** cs = scratch(c, pairs);
      for (int64_t p = 0; p < pairs; ++p) {
        ys[p] = acc + plan.row[s.begin + p] * width;
        cs[p] = coef + s.h + p * s.rank;
      }
      // A row that names an adapter twice must not sit twice in one tile, which would lose a sum.
      for (int64_t p = 0, q; p < pairs; p = q) {
        for (q = p + 1; q < pairs && ys[q] != ys[q - 1];) ++q;
        kernels.expand(ys + p, int(q - p), cs + p, b, source.dtype, s.rank, n);
      }
    }
    const int64_t base_size = dtype_size(output.base_dtype), size = dtype_size(output.dtype);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = plan.first_row + i;
      const char* base = output.base;
      if (base) base += (row * output.base_stride + o) * base_size;
      kernels.store(acc + i * width, base, output.base_dtype,
                    output.out + (row * output.columns + o) * size, output.dtype, n);
    }
  });
}

void outer_rows(const MixtureKernels& kernels, const Stack& stack, const Plan& plan,
                const float* coef, const Rows& rows, int64_t columns, char* out, Dtype dtype) {
  constexpr int64_t width = 256;
  const int64_t blocks = (columns + width - 1) / width;
  std::vector<std::pair<const Segment*, int64_t>> tasks;
  std::vector<int64_t> costs;
  for (const Segment& s : plan.segments)
    for (int64_t block = 0; block < blocks; ++block) {
      tasks.emplace_back(&s, block * width);
      costs.push_back((s.end - s.begin) * s.rank * width);
    }
  parallel_tasks(costs, [&](int64_t t) {
    static thread_local std::vector<float> room, turned;
    static thread_local std::vector<float*> y;
    static thread_local std::vector<const float*> c;
    static thread_local std::vector<const void*> b;
    const Segment& s = *tasks[t].first;
    const int64_t o = tasks[t].second, n = std::min(width, columns - o), pairs = s.end - s.begin;
    float* acc = scratch(room, s.rank * width);
    float* by_rank = scratch(turned, s.rank * pairs);
    std::memset(acc, 0, s.rank * width * sizeof(float));
    const void** sources = scratch(b, pairs);
    for (int64_t p = 0; p < pairs; ++p) {
      sources[p] = rows.at(plan.first_row + plan.row[s.begin + p]) + o;
      for (int64_t r = 0; r < s.rank; ++r)
        by_rank[r * pairs + p] = coef[s.h + p * s.rank + r];
    }
    float** ys = scratch(y, s.rank);
    const float** cs = scratch(c, s.rank);
    for (int64_t r = 0; r < s.rank; ++r) {
      ys[r] = acc + r * width;
      cs[r] = by_rank + r * pairs;
    }
    kernels.expand(ys, int(s.rank), cs, sources, Dtype::f32, pairs, n);
    for (int64_t r = 0; r < s.rank; ++r)
      kernels.store(ys[r], nullptr, Dtype::f32,
                    out + ((stack.first_row(s.adapter) + r) * columns + o) * dtype_size(dtype),
                    dtype, n);
  });
}

}  // namespace lora_fused
