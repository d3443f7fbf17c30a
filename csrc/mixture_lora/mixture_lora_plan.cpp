// Routing -> segments and groups: which rows use which adapter, and which adapters share their rows.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <utility>

#include "mixture_lora_engine.h"

namespace lora_fused {
namespace {

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

void check_segment(const Stack& stack, int64_t k, int64_t rank) {
  const bool fits = stack.row_start
                        ? rank >= 0 && stack.row_start[k] >= 0 && stack.row_start[k] + rank <= stack.rows
                        : rank >= 0 && rank <= stack.max_rank;
  STD_TORCH_CHECK(fits, "mixture_lora: row_start or ranks must lie within the stack, got rank ",
                  rank, " for adapter ", k);
}

// Joins segments with the segment before them where the rows are the same.
void group_segments(Plan& plan) {
  plan.groups.clear();
  for (int64_t s = 0; s < int64_t(plan.segments.size()); ++s) {
    Segment& segment = plan.segments[s];
    const int32_t* row = plan.row.data() + segment.begin;
    if (s > 0 && plan.groups.back().rows == segment.rows &&
        std::equal(row, row + segment.rows, plan.rows_of(plan.groups.back()))) {
      Group& group = plan.groups.back();
      segment.at = group.depth;
      group.depth += segment.rank;
      ++group.last;
    } else {
      plan.groups.push_back({s, s + 1, segment.rows, segment.rank, 0});
    }
  }
}

// Groups rows that use the same set of adapters, where there are enough of them: each row is then in
// one group and each output element is written once. False, and nothing changed, where most rows
// have a set of their own.
bool group_by_set(Plan& plan, int64_t rows) {
  struct Use {
    int32_t segment, next;  // the row's uses as a list, adapters ascending
    float factor;
  };
  static thread_local std::vector<Use> uses;
  static thread_local std::vector<int32_t> head, tail;
  static thread_local std::vector<std::pair<uint64_t, int32_t>> order;
  if (rows < 2 * kFewRows || plan.segments.size() < 2) return false;
  uses.clear();
  head.assign(rows, -1);
  tail.assign(rows, -1);
  order.resize(rows);
  for (int64_t i = 0; i < rows; ++i) order[i] = {0, int32_t(i)};
  for (int64_t s = 0; s < int64_t(plan.segments.size()); ++s)
    for (int64_t p = plan.segments[s].begin; p < plan.segments[s].begin + plan.segments[s].rows; ++p) {
      const int32_t row = plan.row[p], use = int32_t(uses.size());
      uses.push_back({int32_t(s), -1, plan.factor[p]});
      (tail[row] < 0 ? head[row] : uses[tail[row]].next) = use;
      tail[row] = use;
      order[row].first = (order[row].first ^ uint64_t(s + 1)) * 0x9e3779b97f4a7c15u;
    }
  std::sort(order.begin(), order.end());
  int64_t sets = 1;
  for (int64_t i = 1; i < rows; ++i) {
    if (order[i].first != order[i - 1].first) {
      ++sets;
      continue;
    }
    // Equal hashes must be equal sets.
    int32_t a = head[order[i].second], b = head[order[i - 1].second];
    for (; a >= 0 && b >= 0 && uses[a].segment == uses[b].segment; a = uses[a].next)
      b = uses[b].next;
    if (a != b) return false;
  }
  if (rows < kFewRows * sets || sets == int64_t(plan.segments.size())) return false;

  static thread_local std::vector<int32_t> row;
  static thread_local std::vector<float> factor;
  static thread_local std::vector<Segment> segments;
  row.clear();
  factor.clear();
  segments.clear();
  plan.groups.clear();
  for (int64_t i = 0, end; i < rows; i = end) {
    for (end = i + 1; end < rows && order[end].first == order[i].first;) ++end;
    Group group = {int64_t(segments.size()), 0, end - i, 0, 0};
    for (int32_t use = head[order[i].second]; use >= 0; use = uses[use].next) {
      const Segment& old = plan.segments[uses[use].segment];
      segments.push_back({old.adapter, old.rank, group.depth, int64_t(row.size()), end - i});
      group.depth += old.rank;
      for (int64_t r = i; r < end; ++r) {
        int32_t& at = head[order[r].second];
        const Use& own = uses[r == i ? use : at];
        row.push_back(order[r].second);
        factor.push_back(own.factor);
        if (r > i) at = own.next;
      }
    }
    group.last = int64_t(segments.size());
    if (group.depth > 0) plan.groups.push_back(group);
  }
  plan.row.swap(row);
  plan.factor.swap(factor);
  plan.segments.swap(segments);
  return true;
}

}  // namespace

void make_plan(const Stack& stack, const Route& route, int64_t first_row, int64_t last_row,
               bool want_pair_of, Plan& plan) {
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

  plan.first_row = first_row;
  plan.last_row = last_row;
  plan.row.clear();
  plan.factor.clear();
  plan.segments.clear();
  plan.pair_of.assign(want_pair_of ? (last_row - first_row) * per_row : 0, -1);
  for (size_t i = 0; i < sorted.size();) {
    const int64_t k = int64_t(sorted[i] >> 32), rank = stack.rank(k);
    check_segment(stack, k, rank);
    const float scale = route.scale ? route.scale[k] : 1.0f;
    const int64_t begin = int64_t(plan.row.size());
    for (; i < sorted.size() && int64_t(sorted[i] >> 32) == k; ++i) {
      const int64_t at = int64_t(sorted[i] & 0xffffffffu), local = at / per_row;
      const int64_t m = route.mixture(first_row + local);
      const float factor = route.weights[m * per_row + at % per_row] * scale;
      if (int64_t(plan.row.size()) > begin && plan.row.back() == local) {
        plan.factor.back() += factor;
      } else {
        plan.row.push_back(int32_t(local));
        plan.factor.push_back(factor);
      }
      if (want_pair_of) plan.pair_of[at] = int32_t(plan.row.size()) - 1;
    }
    if (rank > 0)
      plan.segments.push_back({k, rank, 0, begin, int64_t(plan.row.size()) - begin});
  }
  // Backward sums an adapter's gradient over its rows, so it wants each adapter in one group.
  // With one adapter a row, sets are segments.
  if (want_pair_of || per_row == 1 || !group_by_set(plan, last_row - first_row)) group_segments(plan);
  plan.h_size = 0;
  for (Group& group : plan.groups) {
    group.h = plan.h_size;
    plan.h_size += group.rows * group.depth;
  }
}

}  // namespace lora_fused
