// Runs CPU kernels on torch's threads: the level in force, task distribution, scratch, counters.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/params/attention.h"
#include "cpu/kernels/table.h"
#include "ops/check.h"

namespace flashinfer_lite {

// The kernels of the level in force for an element type. Throws if FLASHINFER_LITE_ISA names a
// level that this machine does not have.
const cpu::Kernels& cpu_kernels(ScalarType element);

// Count for stats(): one call; rows that a unified maximum was checked for, and recomputed.
void count_call();
void count_rows(int64_t checked, int64_t recomputed);

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Work below this many multiply-adds is done before another thread has woken up.
constexpr double kSerialWork = 1e5;

// Scratch up to this many bytes lies on the stack: allocating it is much of a small call.
constexpr int64_t kSmallScratch = 32 << 10;

// Multiply-adds of a forward over all pairs.
inline double forward_work(const AttentionParams& p) {
  return double(p.batch_size) * p.num_heads_q * p.seqlen_q * p.seqlen_kv *
         (p.head_dim + p.head_dim_v);
}

// run(task, scratch) for `tasks` tasks, `grain` at a time, on as many threads as `work`
// multiply-adds deserve, each with `bytes` of scratch. Which thread runs a task never changes its
// result.
template <class Run>
void run_pool(int64_t tasks, int64_t bytes, double work, int64_t grain, const Run& run) {
  if (tasks == 0) return;
  const int64_t threads = work < kSerialWork ? 1 : torch::stable::get_num_threads();
  const int64_t workers = std::min((tasks + grain - 1) / grain, threads);
  bytes = (bytes + 63) / 64 * 64;
  alignas(64) char small[kSmallScratch];
  const bool fits = workers * bytes <= kSmallScratch;
  const std::unique_ptr<char, FreeDeleter> large(
      fits ? nullptr : static_cast<char*>(std::aligned_alloc(64, workers * bytes)));
  char* const scratch = fits ? small : large.get();
  check(scratch != nullptr, "out of memory: ", workers * bytes, " bytes of scratch");

  std::atomic<int64_t> next{0};
  const auto work_on = [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t task; (task = next.fetch_add(grain, std::memory_order_relaxed)) < tasks;) {
        for (int64_t t = task; t < std::min(task + grain, tasks); ++t) {
          run(t, scratch + worker * bytes);
        }
      }
    }
  };
  if (workers == 1) {
    work_on(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, work_on);
  }
}

// All tasks of one problem.
template <class Params>
void run_tasks(const cpu::Kernel<Params>& kernel, const Params& p, double work, int64_t grain = 1) {
  run_pool(kernel.tasks(p), kernel.scratch(p), work, grain,
           [&](int64_t task, char* scratch) { kernel.run(p, task, scratch); });
}

// All tasks of many problems, which share the threads. The longest tasks come first: what runs
// last should be short.
template <class Params>
void run_tasks(const cpu::Kernel<Params>& kernel, const std::vector<Params>& problems,
               double work) {
  struct Entry {
    double work_per_task;
    const Params* problem;
    int64_t tasks;
  };
  std::vector<Entry> entries;
  int64_t bytes = 0, tasks = 0;
  entries.reserve(problems.size());
  for (const Params& p : problems) {
    const int64_t count = kernel.tasks(p);
    if (count == 0) continue;
    entries.push_back({forward_work(p) / double(count), &p, count});
    bytes = std::max(bytes, kernel.scratch(p));
    tasks += count;
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.work_per_task > b.work_per_task;
  });
  std::vector<int64_t> first(entries.size());  // number of each entry's first task
  for (size_t i = 1; i < entries.size(); ++i) first[i] = first[i - 1] + entries[i - 1].tasks;
  run_pool(tasks, bytes, work, 1, [&](int64_t task, char* scratch) {
    const auto i = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
    kernel.run(*entries[i].problem, task - first[i], scratch);
  });
}

}  // namespace flashinfer_lite
