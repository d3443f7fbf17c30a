// mixture_lora on raw pointers: routing -> segments, then shrink, expand and outer over them.
//
// Rows are visited adapter by adapter (segments), so an adapter is read once for all the rows that
// use it. Neighbouring segments with the same rows form one group, whose ranks are taken as one
// depth: rows that share a mixture become one matrix product. A row's own order of summation is by
// ascending adapter id, then rank, whatever the grouping: it does not depend on the other rows.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/parallel.h"
#include "mixture_lora_kernels.h"

namespace lora_fused {

constexpr int64_t kFewRows = 6;  // a tile of rows; fewer do not repay a group of their own

// lora_a or lora_b: element (k, r, c) lies at first(k) + r * stride_row + c * stride_col.
struct Side {
  const char* data;
  Dtype dtype;
  int64_t columns, stride_slot, stride_row, stride_col;
};

struct Stack {
  Side a, b;
  const int32_t* row_start;  // packed: K + 1 entries; null: slotted
  const int32_t* ranks;      // slotted: K entries or null (all max_rank)
  int64_t count, rows, max_rank;

  int64_t rank(int64_t k) const {
    if (row_start) return row_start[k + 1] - row_start[k];
    return ranks ? ranks[k] : max_rank;
  }
  // In rows: where adapter k begins in a contiguous copy of the stack.
  int64_t first_row(int64_t k) const { return row_start ? row_start[k] : k * max_rank; }
  const char* at(const Side& side, int64_t k, int64_t r) const {
    const int64_t first = row_start ? row_start[k] * side.stride_row : k * side.stride_slot;
    return side.data + (first + r * side.stride_row) * dtype_size(side.dtype);
  }
};

struct Route {
  const int32_t* adapter_ids;  // [M, J]
  const float* weights;        // [M, J]
  const float* scale;          // [K] or null
  const int32_t* row_mixture;  // [S] or null
  int64_t mixtures, per_row, groups, rows;

  int64_t mixture(int64_t n) const {
    const int64_t s = n / (rows / groups);
    return row_mixture ? row_mixture[s] : s;
  }
};

// Scratch that outlives a call: a decode step is shorter than the page faults of fresh memory.
template <class T>
T* scratch(std::vector<T>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// Rows from number `first` on, as float32.
struct Rows {
  const float* data;
  int64_t stride, first;
  const float* at(int64_t n) const { return data + (n - first) * stride; }
};

// One adapter in one group; its ranks are [at, at + rank) of the group's depth.
struct Segment {
  int64_t adapter, rank, at;
  int64_t begin, rows;  // its pairs, in the order of the group's rows
};

// Segments [first, last) that the same rows use. Rank-wide buffers hold [rows, depth] from h on.
struct Group {
  int64_t first, last, rows, depth, h;
};

// Pairs are (row, adapter): an adapter named twice by a row is one pair with the sum of the factors.
struct Plan {
  int64_t first_row, last_row;
  std::vector<int32_t> row;      // of each pair, minus first_row
  std::vector<float> factor;     // weight * scale
  std::vector<int32_t> pair_of;  // if asked for: [N, J] -> pair, -1 for none
  std::vector<Segment> segments;
  std::vector<Group> groups;
  int64_t h_size;

  const int32_t* rows_of(const Group& g) const { return row.data() + segments[g.first].begin; }
};

void make_plan(const Stack& stack, const Route& route, int64_t first_row, int64_t last_row,
               bool want_pair_of, Plan& plan);

// h[row of group][r] = <rows[n], side rank row r>, times the pair's factor if `weighted`.
void shrink_rows(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                 const Plan& plan, const Rows& rows, bool weighted, float* h);

// Multiplies the ranks [first_rank, last_rank) of rows [begin, end) of a group by the pairs' factors.
void weigh(const Plan& plan, const Group& group, int64_t begin, int64_t end, int64_t first_rank,
           int64_t last_rank, float* h);

// out[n] = base[n] + sum over groups and r of coef[row of group][r] * rank row r, rounded once.
struct Output {
  const char* base;  // null: the update alone
  Dtype base_dtype;
  int64_t base_stride;  // in elements, between rows
  char* out;
  Dtype dtype;
  int64_t columns;
};
void expand_rows(const MixtureKernels& kernels, const Stack& stack, const Side& side,
                 const Plan& plan, const float* coef, const Output& output);

// out[k][r] = sum over rows of coef[row of group][r] * rows[n], in a contiguous copy of the stack.
void outer_rows(const MixtureKernels& kernels, const Stack& stack, const Plan& plan,
                const float* coef, const Rows& rows, int64_t columns, char* out, Dtype dtype);

}  // namespace lora_fused
