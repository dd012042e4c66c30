#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace soco::cpu {
namespace {

// A loop for several threads: each takes the next task until there is none.
struct Loop {
  int64_t tasks;
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  static void run(void* self) {
    Loop& loop = *static_cast<Loop*>(self);
    for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;)
      loop.body(loop.context, task);
  }
};

class Pool {
 public:
  // False if another thread owns the pool at the moment: the caller then does its work alone.
  bool run(int helpers, Loop& loop) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      loop_ = &loop;
      seats_ = helpers;
    }
    wake_.notify_all();
    Loop::run(&loop);
    // Close the loop to workers that are still asleep, then wait for those that took part.
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++active_;
      Loop* const loop = loop_;
      lock.unlock();
      Loop::run(loop);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  void grow(int helpers) {
    try {
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had from the system: the loop runs on those there are.
    }
  }

  std::mutex owner_;  // held by the thread whose loop is running
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_, done_;
  int workers_ = 0;  // threads started
  int seats_ = 0;    // workers that may still join the running loop
  int active_ = 0;   // workers inside the running loop
  Loop* loop_ = nullptr;
};

// Never destroyed: workers may still sleep in it when the process ends.
std::atomic<Pool*> pool{new Pool};
std::atomic<bool> forked{false};  // this is the child of a process that may have used either

// In a child made by fork() no worker exists any more, and locks may be held for ever.
void after_fork() {
  forked.store(true);
  pool.store(new Pool);
}

#if defined(__unix__) || defined(__APPLE__)
// From when the library is loaded: torch may have used its threads before our first loop.
const int watching = pthread_atfork(nullptr, nullptr, after_fork);
#endif

// The entry that GCC compiles `#pragma omp parallel` to; LLVM's and Intel's libraries have it, too.
using OpenMp = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

// That of the library that torch's own loops run in, null where there is none.
OpenMp find_openmp() {
#if defined(__linux__)
  if (void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
    void* const entry = dlsym(torch, "GOMP_parallel");  // in it, or in what it was linked with
    OpenMp found = nullptr;
    memcpy(&found, &entry, sizeof(entry));
    return found;
  }
#endif
  return nullptr;
}

OpenMp openmp() {
  static const OpenMp found = find_openmp();
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

// Lets the processor know that this is a loop that waits.
void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
  constexpr int kSpins = 2000;  // some ten microseconds; the thread waited for may have no core
  for (int spin = 0; counter.load(std::memory_order_acquire) != value; ++spin) {
    if (spin < kSpins)
      relax();
    else
      std::this_thread::yield();
  }
}

bool uses_openmp() { return openmp() != nullptr; }

void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  constexpr int kMostThreads = 1024;
  int64_t helpers = (threads < kMostThreads ? threads : kMostThreads) - 1;
  if (helpers > tasks - 1) helpers = tasks - 1;
  Loop loop{tasks, body, context};
  if (helpers < 1) return Loop::run(&loop);
  if (const OpenMp team = openmp())
    team(Loop::run, &loop, static_cast<unsigned>(helpers + 1), 0);
  else if (!pool.load()->run(static_cast<int>(helpers), loop))
    Loop::run(&loop);
}

}  // namespace soco::cpu
