#include "mixture_lora_engine.h"

#include <algorithm>
#include <cstring>

namespace lora_fused {
namespace {

constexpr int64_t kRowChunk = 48;   // rows of a shrink task: their block of x stays in L2
constexpr int64_t kRankChunk = 64;  // ranks of a shrink task
constexpr int64_t kWidenRows = 12;  // rows that repay converting 16-bit ranks once
constexpr int64_t kRoom = 1 << 16;  // floats of a thread's output block: 256 KiB, in L2
constexpr int64_t kWideRoom = 1 << 20;  // where few rows share an adapter: long reads of B matter

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Pointers to ranks [first, first + n) of a group from column o on. Rows whose columns are not
// adjacent, and 16-bit rows that many rows will read (`widen`), are first copied to float32
// scratch, `width` columns of them.
struct RankRows {
  std::vector<const void*> pointers;
  std::vector<float> widened;
  Dtype dtype;

  const void* const* load(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                          const Plan& plan, const Group& group, int64_t first, int64_t n,
                          int64_t o, int64_t width, bool widen) {
    const void** p = scratch(pointers, n);
    const bool in_place = side.stride_col == 1 && (side.dtype == Dtype::f32 || !widen);
    dtype = in_place ? side.dtype : Dtype::f32;
    const int64_t offset = o * side.stride_col * dtype_size(side.dtype);
    float* copy = in_place ? nullptr : scratch(widened, n * width);
    for (int64_t s = group.first; s < group.last; ++s) {
      const Segment& segment = plan.segments[s];
      const int64_t end = std::min(segment.at + segment.rank, first + n);
      for (int64_t r = std::max(segment.at, first); r < end; ++r) {
        const void*& row = p[r - first];
        row = stack.at(side, segment.adapter, r - segment.at) + offset;
        if (in_place) continue;
        kernels.widen(row, side.dtype, side.stride_col, copy + (r - first) * width, width);
        row = copy + (r - first) * width;
      }
    }
    return p;
  }
};

}  // namespace

void shrink_rows(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                 const Plan& plan, const Rows& rows, bool weighted, float* h) {
  struct Task {
    const Group* group;
    int64_t begin, end, rank, ranks;
  };
  const int64_t cost = plan.h_size * side.columns, threads = threads_for(cost);
  // Few rows: pieces small enough that every thread gets some.
  const int64_t share = cost / (4 * threads * std::max<int64_t>(side.columns, 1)) / 8 * 8;
  const int64_t limit = threads == 1 ? kRankChunk : std::clamp<int64_t>(share, 8, kRankChunk);
  std::vector<Task> tasks;
  std::vector<int64_t> costs;
  for (const Group& g : plan.groups)
    for (int64_t p = 0; p < g.rows; p += kRowChunk)
      for (int64_t r = 0; r < g.depth; r += limit) {
        tasks.push_back({&g, p, std::min(p + kRowChunk, g.rows), r, std::min(limit, g.depth - r)});
        costs.push_back((tasks.back().end - p) * tasks.back().ranks * side.columns);
      }
  parallel_tasks(costs, [&](int64_t t) {
    static thread_local RankRows source;
    const Task& task = tasks[t];
    const Group& g = *task.group;
    const void* const* a = source.load(kernels, stack, side, plan, g, task.rank, task.ranks, 0,
                                       side.columns, task.end - task.begin >= kWidenRows);
    const int32_t* row = plan.rows_of(g);
    const float* x[kRowChunk];
    float* out[kRowChunk];
    const int count = int(task.end - task.begin);
    for (int i = 0; i < count; ++i) {
      x[i] = rows.at(plan.first_row + row[task.begin + i]);
      out[i] = h + g.h + (task.begin + i) * g.depth + task.rank;
    }
    kernels.shrink(x, count, a, source.dtype, int(task.ranks), side.columns, out);
    if (weighted)
      weigh(plan, g, task.begin, task.end, task.rank, task.rank + task.ranks, h);
  });
}

void weigh(const Plan& plan, const Group& group, int64_t begin, int64_t end, int64_t first_rank,
           int64_t last_rank, float* h) {
  for (int64_t s = group.first; s < group.last; ++s) {
    const Segment& segment = plan.segments[s];
    const int64_t from = std::max(segment.at, first_rank);
    const int64_t to = std::min(segment.at + segment.rank, last_rank);
    for (int64_t p = begin; p < end; ++p)
      for (int64_t r = from; r < to; ++r)
        h[group.h + p * group.depth + r] *= plan.factor[segment.begin + p];
  }
}

namespace {

// Where the parts of a group's depth end: each adapter in pieces of kPart ranks.
void part_ends(const Plan& plan, const Group& group, std::vector<int32_t>& ends) {
  ends.clear();
  for (int64_t s = group.first; s < group.last; ++s) {
    const Segment& segment = plan.segments[s];
    for (int64_t r = 0; r < segment.rank; r += kPart)
      ends.push_back(int32_t(segment.at + std::min<int64_t>(r + kPart, segment.rank)));
  }
}

int64_t visits(const Plan& plan) {
  int64_t rows = 0;
  for (const Group& g : plan.groups) rows += g.rows;
  return rows;
}

// Whether no row is in two groups: then each output element is written once, without a zeroing pass.
bool visited_once(const Plan& plan) {
  static thread_local std::vector<char> seen;
  seen.assign(plan.last_row - plan.first_row, 0);
  if (visits(plan) > int64_t(seen.size())) return false;
  for (const Group& g : plan.groups)
    for (int64_t p = 0; p < g.rows; ++p)
      if (seen[plan.rows_of(g)[p]]++) return false;
  return true;
}

}  // namespace

void expand_rows(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                 const Plan& plan, const float* coef, const Output& output) {
  const int64_t count = plan.last_row - plan.first_row;
  if (count == 0 || side.columns == 0) return;
  const int64_t cost = plan.h_size * side.columns, threads = threads_for(cost);
  const int64_t share = (side.columns + threads - 1) / threads;
  const bool few = visits(plan) < kFewRows * int64_t(plan.groups.size());
  const int64_t room = (few ? kWideRoom : kRoom) / count / 64 * 64;
  const int64_t width = round_up(std::max<int64_t>(64, std::min(share, room)), 64);
  const int64_t blocks = (side.columns + width - 1) / width;
  const bool once = visited_once(plan), untouched = visits(plan) < count;
  // Float32 rows that are whole vectors are summed where they end up.
  const bool in_place = once && output.dtype == Dtype::f32 && side.columns % kPadColumns == 0;
  const int64_t base_size = dtype_size(output.base_dtype), size = dtype_size(output.dtype);
  parallel_tasks(std::vector<int64_t>(blocks, cost / blocks + 1), [&](int64_t t) {
    static thread_local std::vector<float> room;
    static thread_local std::vector<float*> y;
    static thread_local std::vector<const float*> c;
    static thread_local std::vector<int32_t> ends;
    static thread_local RankRows source;
    const int64_t o = t * width, n = std::min(width, side.columns - o);
    char* const first = output.out + (plan.first_row * output.columns + o) * size;
    float* const acc = in_place ? reinterpret_cast<float*>(first) : scratch(room, count * width);
    const int64_t stride = in_place ? output.columns : width;
    if (!once || untouched)
      for (int64_t i = 0; i < count; ++i)
        std::memset(acc + i * stride, 0, round_up(n, kPadColumns) * sizeof(float));
    for (const Group& g : plan.groups) {
      part_ends(plan, g, ends);
      const void* const* b = source.load(kernels, stack, side, plan, g, 0, g.depth, o, n, false);
      const int32_t* row = plan.rows_of(g);
      float** ys = scratch(y, g.rows);
      const float** cs = scratch(c, g.rows);
      for (int64_t p = 0; p < g.rows; ++p) {
        ys[p] = acc + row[p] * stride;
        cs[p] = coef + g.h + p * g.depth;
      }
      kernels.expand(ys, int(g.rows), cs, b, source.dtype, ends.data(),
                     int(ends.size()), n, once);
    }
    if (in_place && !output.base) return;
    for (int64_t i = 0; i < count; ++i) {
      const char* base = output.base;
      if (base) base += ((plan.first_row + i) * output.base_stride + o) * base_size;
      kernels.store(acc + i * stride, base, output.base_dtype, first + i * output.columns * size,
                    output.dtype, n);
    }
  });
}

void outer_rows(const MixtureKernels& kernels, const Stack& stack, const Plan& plan,
                const float* coef, const Rows& rows, int64_t columns, char* out, Dtype dtype) {
  constexpr int64_t width = 256;
  struct Task {
    const Group* group;
    const Segment* segment;
    int64_t o;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> costs;
  for (const Group& g : plan.groups)
    for (int64_t s = g.first; s < g.last; ++s)
      for (int64_t o = 0; o < columns; o += width) {
        tasks.push_back({&g, &plan.segments[s], o});
        costs.push_back(g.rows * plan.segments[s].rank * width);
      }
  parallel_tasks(costs, [&](int64_t t) {
    static thread_local std::vector<float> room, turned;
    static thread_local std::vector<float*> y;
    static thread_local std::vector<const float*> c;
    static thread_local std::vector<const void*> b;
    static thread_local std::vector<int32_t> ends;
    const Group& g = *tasks[t].group;
    const Segment& s = *tasks[t].segment;
    const int64_t o = tasks[t].o, n = std::min(width, columns - o);
    float* acc = scratch(room, s.rank * width);
    float* by_rank = scratch(turned, s.rank * g.rows);
    const void** sources = scratch(b, g.rows);
    for (int64_t p = 0; p < g.rows; ++p) {
      sources[p] = rows.at(plan.first_row + plan.rows_of(g)[p]) + o;
      for (int64_t r = 0; r < s.rank; ++r)
        by_rank[r * g.rows + p] = coef[g.h + p * g.depth + s.at + r];
    }
    float** ys = scratch(y, s.rank);
    const float** cs = scratch(c, s.rank);
    for (int64_t r = 0; r < s.rank; ++r) {
      ys[r] = acc + r * width;
      cs[r] = by_rank + r * g.rows;
    }
    ends.clear();
    for (int64_t p = 0; p < g.rows; p += kPart)
      ends.push_back(int32_t(std::min(p + kPart, g.rows)));
    kernels.expand(ys, int(s.rank), cs, sources, Dtype::f32, ends.data(), int(ends.size()), n, true);
    for (int64_t r = 0; r < s.rank; ++r)
      kernels.store(ys[r], nullptr, Dtype::f32,
                    out + ((stack.first_row(s.adapter) + r) * columns + o) * dtype_size(dtype),
                    dtype, n);
  });
}

}  // namespace lora_fused
