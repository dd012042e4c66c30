#include "svd.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace soco::cpu {
namespace {

struct Release {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr int64_t kLine = 64;

// bytes: whole lines
std::unique_ptr<void, Release> aligned(int64_t bytes) {
  void* memory = std::aligned_alloc(kLine, static_cast<size_t>(bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<void, Release>(memory);
}

}  // namespace

void batched_svd(const SvdBatch& batch, int threads) {
  // A task is worth handing out from about 32^3 operations on.
  const int64_t size = batch.columns * batch.columns * batch.rows;
  const int64_t many = size >= 32768 ? 1 : 32768 / (size + 1) + 1;
  const int64_t tasks = (batch.batch + many - 1) / many;
  const int64_t workers = tasks < threads ? tasks : threads;
  if (workers == 0) return;
  // One piece of scratch for each task that can run at a time, taken and given back by number.
  int64_t bytes = 0;
  at_level([&](auto level) {
    bytes = svd_matrix_bytes<level()>(batch.rows, batch.columns, batch.dtype);
  });
  bytes = (bytes / kLine + 1) * kLine;
  const auto scratch = aligned(bytes * workers);
  const auto taken = std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w) taken[static_cast<size_t>(w)] = false;
  parallel_tasks(threads, tasks, [&](int64_t task) {
    int64_t place = 0;
    while (taken[static_cast<size_t>(place)].exchange(true, std::memory_order_acquire))
      place = (place + 1) % workers;
    char* const own = static_cast<char*>(scratch.get()) + place * bytes;
    at_level([&](auto level) {
      const int64_t end = (task + 1) * many < batch.batch ? (task + 1) * many : batch.batch;
      for (int64_t b = task * many; b < end; ++b) svd_matrix<level()>(batch, b, own);
    });
    taken[static_cast<size_t>(place)].store(false, std::memory_order_release);
  });
}

}  // namespace soco::cpu
