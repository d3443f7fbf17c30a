// Threads: tasks of known cost, split evenly by cost over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lora_fused {

// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr int64_t kSerialCost = 100000;

inline int64_t threads_for(int64_t cost) {
  if (cost < kSerialCost) return 1;
  return std::max<int64_t>(1, torch::stable::get_num_threads());
}

// Runs run(task) for every task; `cost` has one entry per task, in multiply-adds. Which thread runs
// a task changes no result: tasks write disjoint elements.
template <class Run>
void parallel_tasks(const std::vector<int64_t>& cost, const Run& run) {
  const int64_t count = int64_t(cost.size());
  int64_t total = 0;
  for (const int64_t c : cost) total += c;
  const int64_t threads = std::min(threads_for(total), count);
  if (threads <= 1) {
    for (int64_t t = 0; t < count; ++t) run(t);
    return;
  }
  std::vector<int64_t> first(threads + 1, count);
  int64_t done = 0;
  for (int64_t t = 0, part = 0; t < count; ++t) {
    while (part < threads && done >= total * part / threads) first[part++] = t;
    done += cost[t];
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t t = first[part]; t < first[part + 1]; ++t) run(t);
  });
}

}  // namespace lora_fused
