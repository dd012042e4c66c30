// A loop over independent tasks on the core's own small thread pool.
//
// Why not OpenMP: torch ships its own OpenMP runtime under a name of its own, so an extension built
// with -fopenmp brings a second one. Two runtimes do not know each other's thread counts, the idle
// workers of each spin for a while on the cores the other needs next, and a child made by fork()
// hangs in a pool that its parent has used. Here workers sleep between loops, the thread count
// comes with every call (torch.get_num_threads(), read in Python), a forked child starts a fresh
// pool, and nothing but the C++ library is linked.
#pragma once
#include <cstdint>

namespace soco::cpu {

// Calls body(context, task) for task = 0 .. tasks-1, each once, in any order, on the caller and at
// most threads-1 workers; returns when all are done. Everything runs on the caller when threads is
// 1, or when another thread is inside a loop of this pool already. `body` must not throw.
void parallel_for(int threads, int64_t tasks, void (*body)(void* context, int64_t task),
                  void* context);

// How many rows of `bytes` each make a task worth handing to another thread.
inline int64_t rows_per_task(int64_t bytes) {
  constexpr int64_t kTaskBytes = 64 * 1024;
  return bytes >= kTaskBytes ? 1 : (bytes <= 1 ? kTaskBytes : kTaskBytes / bytes);
}

// Calls body(begin, end) for consecutive ranges of rows_of_a_task rows that cover 0 .. rows-1.
template <typename Body>
void parallel_rows(int threads, int64_t rows, int64_t rows_of_a_task, Body body) {
  const auto task = [&](int64_t number) {
    const int64_t begin = number * rows_of_a_task;
    const int64_t end = rows - begin < rows_of_a_task ? rows : begin + rows_of_a_task;
    body(begin, end);
  };
  parallel_for(
      threads, rows / rows_of_a_task + (rows % rows_of_a_task != 0),
      [](void* context, int64_t number) { (*static_cast<decltype(task)*>(context))(number); },
      const_cast<void*>(static_cast<const void*>(&task)));
}

}  // namespace soco::cpu
