// What the instructions in csrc/cuda/ptx.cuh do, in plain C++.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "dtype.h"

namespace soco::cuda {

inline unsigned char* shared_memory() { return emulated::block->shared->memory; }

inline void done(const emulated::Copy& copy) {
  if (copy.from == nullptr)
    memset(copy.to, 0, 16);
  else
    memcpy(copy.to, copy.from, 16);
}

// A copy comes about at once or as late as it may: which, is drawn. Until then there is NaN.
inline void copy_16(void* shared, const void* global, bool there) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    emulated::fail("a copy of 16 bytes that are not aligned");
  emulated::Fiber& own = *emulated::block->now;
  if (emulated::block->dependent && !own.waited)
    __atomic_add_fetch(&emulated::machine.hasty, 1, __ATOMIC_RELAXED);
  if (there) __atomic_add_fetch(&emulated::machine.copied, 16, __ATOMIC_RELAXED);
  const emulated::Copy copy{shared, there ? global : nullptr, own.sets};
  if (emulated::block->random() % 2) return done(copy);
  memset(shared, 0xff, 16);
  own.copies.push_back(copy);
}

inline void close_copies() { ++emulated::block->now->sets; }

template <int kLeft>
void wait_for_copies() {
  emulated::Fiber& own = *emulated::block->now;
  auto& copies = own.copies;
  const auto last = std::stable_partition(
      copies.begin(), copies.end(),
      [&](const emulated::Copy& copy) { return copy.set < own.sets - kLeft; });
  std::for_each(copies.begin(), last, done);
  copies.erase(copies.begin(), last);
}

template <typename T>
float half_of(uint32_t pair, int which) {
  return widen(T{static_cast<uint16_t>(pair >> 16 * which)});
}

template <typename T>
void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Warp& warp = emulated::warp();
  const unsigned lane = emulated::number() % 32;
  std::copy(a, a + 4, warp.exchange[lane]);
  std::copy(b, b + 2, warp.exchange[lane] + 4);
  emulated::meet(warp.together);
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned q = k % 8 / 2, half = k % 2, upper = k / 8;
      sum += static_cast<double>(
                 half_of<T>(warp.exchange[row % 8 * 4 + q][row / 8 + 2 * upper], half)) *
             half_of<T>(warp.exchange[column * 4 + q][4 + upper], half);
    }
    sums[i] = static_cast<float>(sum);
  }
  emulated::meet(warp.together);
}

template <typename T>
uint32_t narrow_pair(float first, float second) {
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
}

template <typename T>
uint32_t multiply_add_pair(uint32_t one, uint32_t other, uint32_t added) {
  const auto number = [&](int which) {
    return half_of<T>(one, which) * half_of<T>(other, which) + half_of<T>(added, which);
  };
  return narrow_pair<T>(number(0), number(1));
}

inline void grid_barrier(uint32_t* counter) {
  const uint32_t part = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
  const uint32_t before = __atomic_fetch_add(counter, part, __ATOMIC_ACQ_REL);
  while (((before ^ __atomic_load_n(counter, __ATOMIC_ACQUIRE)) & 0x80000000u) == 0)
    emulated::spin();
}

inline void read_ahead(const void* global, uint32_t bytes) {
  if ((reinterpret_cast<uintptr_t>(global) | bytes) % 16 != 0 || bytes == 0)
    emulated::fail("bytes to be read ahead that are not a multiple of 16");
  for (uint32_t i = 0; i < bytes; i += 16)  // they are there
    static_cast<void>(static_cast<const volatile unsigned char*>(global)[i]);
  __atomic_add_fetch(&emulated::machine.ahead, bytes, __ATOMIC_RELAXED);
}

inline void wait_for_stream() {
  emulated::block->now->waited = true;
  emulated::write_late();
}

inline void let_next_begin() {
  if (!emulated::block->released)
    __atomic_add_fetch(&emulated::machine.released, 1, __ATOMIC_RELAXED);
  emulated::block->released = true;
}

inline float4 load_fresh(const float* four) {
  if (reinterpret_cast<uintptr_t>(four) % 16 != 0)
    emulated::fail("a load of 16 bytes that are not aligned");
  return *reinterpret_cast<const float4*>(four);
}
inline float load_fresh_one(const float* one) { return *one; }

}  // namespace soco::cuda
