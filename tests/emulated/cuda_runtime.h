// CUDA's runtime as far as csrc/cuda/ uses it, for a processor: the kernels, compiled as plain C++,
// run here, so that they are tested without a GPU.
//
// Every thread of a block is a fiber, and the fibers run in an order that is drawn anew all the
// time. They change at barriers and where a warp computes together, and a warp that is drawn now
// and then stands still for a while, so that a barrier that is missing shows as a wrong result.
// Blocks of a cooperative launch run at the same time, each in a thread of the system; others run
// one after the other. Shared memory begins as NaN.
//
// What a stream ran before may be written late: a dependent launch sees NaN in its place until one
// of its threads waits for the stream; threads that copy before they wait are counted.
#pragma once
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ thread_local
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulated {

// What a test may set.
struct Machine {
  int multiprocessors = 3;
  int shared = 227 * 1024;
  int major = 9;
  bool refuses = false;  // cooperative launches
  uint64_t seed = 0;
  int launches = 0;    // counted
  int forgotten = 0;   // threads that ended with copies on their way
  int dependent = 0;   // launches
  int hasty = 0;       // threads that copied, or ended, before they waited for the stream
  int released = 0;    // blocks that let the next grid begin
  int64_t ahead = 0;   // bytes that were read ahead
  int64_t copied = 0;  // bytes, by 16
};
inline Machine machine;

// What the stream ran before, and has not been seen to write yet.
struct Late {
  void* at;
  std::vector<unsigned char> bytes;
};
inline std::vector<Late> late;
inline std::mutex late_lock;

inline void write_late() {
  const std::lock_guard<std::mutex> hold(late_lock);
  for (const Late& one : late) memcpy(one.at, one.bytes.data(), one.bytes.size());
  late.clear();
}

// Memory between two pages that must not be touched: it ends where the one begins, or begins where
// the other ends. It is all ones: NaN in any floating-point type.
struct Guarded {
  size_t bytes, size;
  unsigned char* pages;
  unsigned char* memory;

  Guarded(size_t bytes_, bool at_the_beginning) : bytes((bytes_ + 15) / 16 * 16) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size = ((bytes + page - 1) / page + 2) * page;
    pages = static_cast<unsigned char*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(pages, page, PROT_NONE);
    mprotect(pages + size - page, page, PROT_NONE);
    memory = at_the_beginning ? pages + page : pages + size - page - bytes;
    memset(memory, 0xff, bytes);
  }
  ~Guarded() { munmap(pages, size); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
};

struct Rendezvous {
  unsigned size = 0, come = 0, turn = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int set;
};

struct Fiber {
  ucontext_t context;
  dim3 thread;
  bool done = false;
  const Rendezvous* waits = nullptr;  // for its turn to change
  unsigned turn = 0;
  bool spins = false;  // waits for another block
  std::vector<Copy> copies;
  int sets = 0;
  bool waited = false;  // for the stream
};

struct Warp {
  Rendezvous together;
  int sleeps = 0;  // rounds that it is not run for
  uint32_t exchange[32][8];
};

struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Rendezvous all;
  std::unique_ptr<Guarded> shared;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  std::mt19937_64 random;
  std::function<void()> kernel;
  bool dependent = false, released = false;
};
inline thread_local Block* block = nullptr;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated CUDA: %s\n", what);
  abort();
}

inline void switch_away() {
  Block& b = *block;
  swapcontext(&b.now->context, &b.scheduler);
}

inline void meet(Rendezvous& place) {
  if (++place.come == place.size) {
    place.come = 0;
    ++place.turn;
    switch_away();
    return;
  }
  Fiber& own = *block->now;
  own.waits = &place;
  own.turn = place.turn;
  switch_away();
}

inline void spin() {
  block->now->spins = true;
  switch_away();
  block->now->spins = false;
}

inline unsigned number() {
  const dim3 t = block->now->thread, s = block->size;
  return (t.z * s.y + t.y) * s.x + t.x;
}
inline Warp& warp() { return block->warps[number() / 32]; }

inline void enter() {
  Block& b = *block;
  b.kernel();
  if (b.dependent && !b.now->waited) __atomic_add_fetch(&machine.hasty, 1, __ATOMIC_RELAXED);
  if (!b.now->copies.empty()) __atomic_add_fetch(&machine.forgotten, 1, __ATOMIC_RELAXED);
  b.now->done = true;
  switch_away();
}

inline void run_block(Block& b) {
  constexpr size_t kStack = 128 * 1024;
  block = &b;
  const size_t count = static_cast<size_t>(b.size.x) * b.size.y * b.size.z;
  std::unique_ptr<unsigned char[]> stacks(new unsigned char[count * kStack]);
  b.fibers.resize(count);
  b.warps.resize((count + 31) / 32);
  for (size_t w = 0; w < b.warps.size(); ++w)
    b.warps[w].together.size = static_cast<unsigned>(count - 32 * w < 32 ? count - 32 * w : 32);
  b.all.size = static_cast<unsigned>(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.thread =
        dim3(static_cast<unsigned>(i % b.size.x), static_cast<unsigned>(i / b.size.x % b.size.y),
             static_cast<unsigned>(i / b.size.x / b.size.y));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.get() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &b.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<Fiber*> order;
  for (Fiber& fiber : b.fibers) order.push_back(&fiber);
  for (size_t left = count; left > 0;) {
    bool ran = false, spun = false, slept = false;
    for (Warp& one : b.warps) one.sleeps -= one.sleeps > 0;
    if (b.random() % 8 == 0) b.warps[b.random() % b.warps.size()].sleeps = b.random() % 64;
    const size_t begin = b.random() % order.size();
    const bool backward = b.random() % 2;
    for (size_t i = 0; i < order.size(); ++i) {
      Fiber& fiber = *order[(begin + (backward ? order.size() - i : i)) % order.size()];
      if (b.warps[static_cast<size_t>(&fiber - b.fibers.data()) / 32].sleeps > 0) {
        slept = true;
        continue;
      }
      if (fiber.done || (fiber.waits != nullptr && fiber.waits->turn == fiber.turn)) continue;
      fiber.waits = nullptr;
      spun = spun || fiber.spins;
      ran = ran || !fiber.spins;
      b.now = &fiber;
      swapcontext(&b.scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (!ran && !spun && !slept) fail("threads of a block wait for each other for ever");
    if (!ran) std::this_thread::yield();
  }
  block = nullptr;
}

inline void launch(dim3 grid, dim3 size, size_t shared, bool together, bool dependent,
                   const std::function<void()>& kernel) {
  ++machine.launches;
  machine.dependent += dependent;
  if (!dependent) write_late();
  std::vector<Block> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& b = blocks[i];
    b.index = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y));
    b.size = size;
    b.grid = grid;
    b.shared.reset(new Guarded(shared, false));
    b.random.seed(machine.seed + 7919 * i);
    b.kernel = kernel;
    b.dependent = dependent;
    if (together)
      threads.emplace_back(run_block, std::ref(b));
    else
      run_block(b);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace emulated

// threadIdx.x and its like, of the fiber that runs.
template <dim3 (*kWhich)()>
struct Dimensions {
  struct X {
    operator unsigned() const { return kWhich().x; }
  } x;
  struct Y {
    operator unsigned() const { return kWhich().y; }
  } y;
  struct Z {
    operator unsigned() const { return kWhich().z; }
  } z;
};
namespace emulated {
inline dim3 thread_index() { return block->now->thread; }
inline dim3 block_index() { return block->index; }
inline dim3 block_size() { return block->size; }
inline dim3 grid_size() { return block->grid; }
}  // namespace emulated
inline const Dimensions<emulated::thread_index> threadIdx{};
inline const Dimensions<emulated::block_index> blockIdx{};
inline const Dimensions<emulated::block_size> blockDim{};
inline const Dimensions<emulated::grid_size> gridDim{};

inline void __syncthreads() { emulated::meet(emulated::block->all); }
inline void __syncwarp() { emulated::meet(emulated::warp().together); }

template <typename V>
V exchanged(V value, unsigned from) {
  emulated::Warp& w = emulated::warp();
  const unsigned lane = emulated::number() % 32;
  memcpy(w.exchange[lane], &value, sizeof(V));
  emulated::meet(w.together);
  if (from < w.together.size) memcpy(&value, w.exchange[from], sizeof(V));
  emulated::meet(w.together);
  return value;
}
template <typename V>
V __shfl_down_sync(unsigned, V value, unsigned delta) {
  return exchanged(value, emulated::number() % 32 + delta);
}
template <typename V>
V __shfl_xor_sync(unsigned, V value, unsigned mask) {
  return exchanged(value, (emulated::number() % 32) ^ mask);
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int atomicMin(int* at, int value) {
  const int before = *at;
  if (value < before) *at = value;
  return before;
}
inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorCooperativeLaunchTooLarge = 82 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulated::machine.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulated::machine.shared;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulated::machine.major;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
  }
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (bytes > emulated::machine.shared) emulated::fail("more shared memory than there is");
  return cudaSuccess;
}
template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  bool together = false, dependent = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeCooperative)
      together = config->attrs[i].val.cooperative != 0;
    else
      dependent = config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  if (together && emulated::machine.refuses) return cudaErrorCooperativeLaunchTooLarge;
  emulated::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, together, dependent,
                   [&] { kernel(static_cast<Parameters>(args)...); });
  return cudaSuccess;
}
