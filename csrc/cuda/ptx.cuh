// The instructions that C++ has no word for, a function each. tests/emulated/cuda/ptx.cuh says in
// plain C++ what they do, for a processor.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace soco::cuda {

// The memory that the threads of a block share, of the size given at the launch.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// Starts to copy 16 bytes from global to shared memory; zeros, if they are not `there`. Copies of a
// thread belong to the set that it closes next.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool there) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const unsigned bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all sets that the thread closed are there, but for the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// sums (16, 8) += a (16, 16) b (16, 8), by a warp. With g = lane / 4 and q = lane % 4, a lane holds
// of sums: rows g and g + 8 (the second two), columns 2q and 2q + 1; of a, as pairs: rows g, g + 8,
// g, g + 8, columns 2q and 2q + 1, and those plus 8 in the last two; of b: column g, rows 2q and
// 2q + 1, and those plus 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<BFloat16>(float (&sums)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<Float16>(float (&sums)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats as a pair in 16 bits, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t narrow_pair<BFloat16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<Float16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// one * other + added, of pairs in 16 bits, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_add_pair(uint32_t one, uint32_t other, uint32_t added);
template <>
__device__ __forceinline__ uint32_t multiply_add_pair<BFloat16>(uint32_t one, uint32_t other,
                                                                uint32_t added) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(one), "r"(other), "r"(added));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t multiply_add_pair<Float16>(uint32_t one, uint32_t other,
                                                               uint32_t added) {
  uint32_t pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(one), "r"(other), "r"(added));
  return pair;
}

#if __CUDA_ARCH__ >= 890 && CUDA_VERSION >= 12010
#define SOCO_HAS_FLOAT8_INSTRUCTION
// Two float8 (the lower 16 bits) as a pair in 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t float8_pair(uint32_t two) {
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(two)));
  if constexpr (std::is_same_v<T, Float16>) return pair;
  const Float16 first{static_cast<uint16_t>(pair)}, second{static_cast<uint16_t>(pair >> 16)};
  return narrow_pair<T>(widen(first), widen(second));
}
#endif

// Past this point the thread sees what all blocks of the grid wrote before it. One thread of each
// block calls it, between two barriers of the block; all blocks have to be running. The counter
// grows by 2^31 in all, so its highest bit turns when the last block has come: it need not be reset
// in between, and the next grid may be of another size.
__device__ __forceinline__ void grid_barrier(uint32_t* counter) {
  const uint32_t part = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
  uint32_t before, now;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(part)
               : "memory");
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (((before ^ now) & 0x80000000u) == 0);
}

// Asks for global memory to be brought into the cache that all blocks share, and waits for nothing.
// `global` and `bytes` are multiples of 16.
__device__ __forceinline__ void read_ahead(const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
#endif
}

// In a grid that was launched as a dependent one: waits until what its stream ran before has ended,
// and all that it wrote can be seen. In others it returns at once.
__device__ __forceinline__ void wait_for_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next grid of the stream, if it is a dependent one, may begin when every block has said so.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Four floats that another block wrote.
__device__ __forceinline__ float4 load_fresh(const float* four) {
  return __ldcg(reinterpret_cast<const float4*>(four));
}
__device__ __forceinline__ float load_fresh_one(const float* one) { return __ldcg(one); }

}  // namespace soco::cuda
