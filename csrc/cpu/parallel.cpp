#include "cpu/parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace soco::cpu {
namespace {

class Pool {
 public:
  // False if another thread owns the pool at the moment: the caller then does its work alone.
  bool run(int helpers, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      body_ = body;
      context_ = context;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      seats_ = helpers;
    }
    wake_.notify_all();
    work(tasks, body, context);
    // Close the loop to workers that are still asleep, then wait for those that took part.
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void work(int64_t tasks, void (*body)(void*, int64_t), void* context) {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(context, task);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++active_;
      const int64_t tasks = tasks_;
      const auto body = body_;
      void* const context = context_;
      lock.unlock();
      work(tasks, body, context);
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
  std::mutex mutex_;  // guards everything below but next_
  std::condition_variable wake_, done_;
  int workers_ = 0;  // threads started
  int seats_ = 0;    // workers that may still join the running loop
  int active_ = 0;   // workers inside the running loop
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
};

// Never destroyed: workers may still sleep in it when the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const bool made = [] {
    pool.store(new Pool);
#if defined(__unix__) || defined(__APPLE__)
    // The workers do not exist in a forked child, and the locks may be held: start afresh there.
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
#endif
    return true;
  }();
  static_cast<void>(made);
  return *pool.load();
}

}  // namespace

void parallel_for(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  constexpr int kMostThreads = 1024;
  int64_t helpers = (threads < kMostThreads ? threads : kMostThreads) - 1;
  if (helpers > tasks - 1) helpers = tasks - 1;
  if (helpers > 0 && the_pool().run(static_cast<int>(helpers), tasks, body, context)) return;
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace soco::cpu
