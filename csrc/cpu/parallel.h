// A loop over independent tasks, on the threads that torch's own loops run on.
//
// Torch brings an OpenMP runtime under a name of its own, so an extension built with -fopenmp
// brings a second one. Two runtimes do not know each other, and the idle workers of each spin for a
// while on the cores that the other needs next: behind a loop of torch's, ours then ran no faster
// on two threads than on one. So nothing is linked. The entry of torch's runtime is looked up in
// the running process, and the thread count comes with every call (torch.get_num_threads(), read in
// Python). Where there is none - another build of torch, and in a child made by fork(), where it
// would hang - a small pool of our own does the work, whose workers sleep between loops.
#pragma once
#include <atomic>
#include <cstdint>

namespace soco::cpu {

// Calls body(context, task) for task = 0 .. tasks-1, each once, handed out in order, on the caller
// and at most threads-1 workers; returns when all are done. Everything runs on the caller when
// threads is 1, inside a loop of torch's, or when another thread is inside a loop of our pool
// already. `body` must not throw.
void parallel_for(int threads, int64_t tasks, void (*body)(void* context, int64_t task),
                  void* context);

// How many rows of `bytes` each make a task worth handing to another thread.
inline int64_t rows_per_task(int64_t bytes) {
  constexpr int64_t kTaskBytes = 64 * 1024;
  return bytes >= kTaskBytes ? 1 : (bytes <= 1 ? kTaskBytes : kTaskBytes / bytes);
}

// Whether the loops run in torch's runtime.
bool uses_openmp();

// The same for a body that is any callable.
template <typename Body>
void parallel_tasks(int threads, int64_t tasks, Body body) {
  parallel_for(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      &body);
}

// Waits until `counter` is `value`, which other threads are about to make it.
void wait_for(const std::atomic<int64_t>& counter, int64_t value);

// Calls first(0) .. first(firsts-1) and then, when all of these are done, second(0) ..
// second(seconds-1), in one loop: no thread goes to sleep in between. Tasks are handed out in
// order, so that whoever waits for the first ones waits for threads that are working on them.
template <typename First, typename Second>
void two_phases(int threads, int64_t firsts, int64_t seconds, First first, Second second) {
  std::atomic<int64_t> done{0};
  parallel_tasks(threads, firsts + seconds, [&](int64_t task) {
    if (task < firsts) {
      first(task);
      done.fetch_add(1, std::memory_order_release);
    } else {
      wait_for(done, firsts);
      second(task - firsts);
    }
  });
}

// Calls body(begin, end) for consecutive ranges of rows_of_a_task rows that cover 0 .. rows-1.
template <typename Body>
void parallel_rows(int threads, int64_t rows, int64_t rows_of_a_task, Body body) {
  const int64_t tasks = rows / rows_of_a_task + (rows % rows_of_a_task != 0);
  parallel_tasks(threads, tasks, [&](int64_t number) {
    const int64_t begin = number * rows_of_a_task;
    const int64_t end = rows - begin < rows_of_a_task ? rows : begin + rows_of_a_task;
    body(begin, end);
  });
}

}  // namespace soco::cpu
