#include <type_traits>

#include "cuda/launch.cuh"
#include "spectral.h"

namespace soco::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLines = 8;  // tokens that a block of the backward kernel works on at a time

// `count` numbers that are read and written at once: 16 bytes, or one.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

template <typename T, typename S, int count>
__global__ void spectral_scale_kernel(const T* __restrict__ x, const S* __restrict__ scale,
                                      const uint8_t* __restrict__ mask, T* __restrict__ y,
                                      int64_t packs, int64_t rank) {
  using A = Accumulate<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < packs;
       e += stride) {
    const int64_t i = e * count % rank;
    Pack<T, count> pack = reinterpret_cast<const Pack<T, count>*>(x)[e];
#pragma unroll
    for (int c = 0; c < count; ++c) {
      const A scaled = widen(pack.at[c]) * static_cast<A>(widen(scale[i + c]));
      pack.at[c] = narrow<T>(mask[i + c] ? scaled : A(0));
    }
    reinterpret_cast<Pack<T, count>*>(y)[e] = pack;
  }
}

// A block owns kWarp * count columns of one partial, that is of up to kTokensOfAPartial tokens of a
// segment: it writes their grad_x and the sum of grad * x over them. grad_x may be grad.
constexpr int kWarp = 32;

template <typename T, typename S, int count>
__global__ void spectral_scale_backward_kernel(const T* grad, const T* __restrict__ x,
                                               const S* __restrict__ scale,
                                               const uint8_t* __restrict__ mask, T* grad_x,
                                               Accumulate<T>* __restrict__ partials, int64_t length,
                                               int64_t rank, int64_t partial_rows, int64_t blocks) {
  using A = Accumulate<T>;
  __shared__ A sums[kLines][kWarp * count];
  const int64_t tiles = (rank + kWarp * count - 1) / (kWarp * count);
  for (int64_t p = blockIdx.y; p < partial_rows; p += gridDim.y) {
    const int64_t begin = p % blocks * kTokensOfAPartial;
    const int64_t end = begin + kTokensOfAPartial < length ? begin + kTokensOfAPartial : length;
    const int64_t segment = p / blocks * length;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t i = (tile * kWarp + threadIdx.x) * count;
      A own[count] = {};
      if (i < rank) {
        A factor[count];
        bool kept[count];
#pragma unroll
        for (int c = 0; c < count; ++c) {
          factor[c] = static_cast<A>(widen(scale[i + c]));
          kept[c] = mask[i + c];
        }
        for (int64_t t = begin + threadIdx.y; t < end; t += kLines) {
          const int64_t at = ((segment + t) * rank + i) / count;
          const Pack<T, count> given = reinterpret_cast<const Pack<T, count>*>(grad)[at];
          const Pack<T, count> seen = reinterpret_cast<const Pack<T, count>*>(x)[at];
          Pack<T, count> scaled;
#pragma unroll
          for (int c = 0; c < count; ++c) {
            const A g = widen(given.at[c]);
            own[c] += g * widen(seen.at[c]);
            scaled.at[c] = narrow<T>(kept[c] ? g * factor[c] : A(0));
          }
          reinterpret_cast<Pack<T, count>*>(grad_x)[at] = scaled;
        }
      }
#pragma unroll
      for (int c = 0; c < count; ++c) sums[threadIdx.y][threadIdx.x * count + c] = own[c];
      __syncthreads();
      // The lines of a column are added up in their order, by the threads side by side.
      for (int64_t c = threadIdx.y * kWarp + threadIdx.x; c < kWarp * count; c += kLines * kWarp) {
        const int64_t column = tile * kWarp * count + c;
        if (column < rank) {
          A total = 0;
          for (int line = 0; line < kLines; ++line) total += sums[line][c];
          partials[p * rank + column] = total;
        }
      }
      __syncthreads();
    }
  }
}

template <typename A>
__global__ void spectral_partials_kernel(const A* __restrict__ partials, A* __restrict__ sums,
                                         int64_t segments, int64_t blocks, int64_t rank) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < segments * rank;
       e += stride) {
    const int64_t first = e / rank * blocks;
    A sum = 0;
    for (int64_t p = first; p < first + blocks; ++p) sum += partials[p * rank + e % rank];
    sums[e] = sum;
  }
}

// Whether rows of T can be read 16 bytes at a time.
template <typename T>
bool in_packs(int64_t rank, const void* a, const void* b, const void* c) {
  constexpr uintptr_t kBytes = 16;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                         reinterpret_cast<uintptr_t>(c) | static_cast<uintptr_t>(rank) * sizeof(T);
  return bits % kBytes == 0;
}

// body(T*, S*) for the pairs there are: scale is of x's dtype or float32.
template <typename Body>
void visit_pair(Dtype dtype, Dtype scale_dtype, Body body) {
  visit(dtype, [&](auto* tag) {
    if (scale_dtype == Dtype::kFloat32)
      body(tag, static_cast<float*>(nullptr));
    else if (scale_dtype == dtype)
      body(tag, tag);
    else
      throw std::invalid_argument("spectral_scale: scale must be of x's dtype or float32");
  });
}

}  // namespace

void spectral_scale(const void* x, const void* scale, const uint8_t* mask, void* y, int64_t tokens,
                    int64_t rank, Dtype dtype, Dtype scale_dtype, void* stream) {
  const int64_t numbers = tokens * rank;
  if (numbers == 0) return;
  visit_pair(dtype, scale_dtype, [&](auto* tag, auto* scale_tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = std::remove_pointer_t<decltype(scale_tag)>;
    constexpr int kPack = 16 / sizeof(T);
    const bool packed = in_packs<T>(rank, x, x, y);
    const int64_t packs = packed ? numbers / kPack : numbers;
    const auto kernel =
        packed ? spectral_scale_kernel<T, S, kPack> : spectral_scale_kernel<T, S, 1>;
    launch("spectral_scale", kernel, grid_size(packs, kThreads), kThreads, stream,
           static_cast<const T*>(x), static_cast<const S*>(scale), mask, static_cast<T*>(y), packs,
           rank);
  });
}

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* sums, void* partials,
                             int64_t tokens, int64_t rank, int64_t segments, Dtype dtype,
                             Dtype scale_dtype, void* stream) {
  if (rank == 0 || segments == 0) return;
  const int64_t length = tokens / segments, blocks = spectral_partials(length, 1);
  visit_pair(dtype, scale_dtype, [&](auto* tag, auto* scale_tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = std::remove_pointer_t<decltype(scale_tag)>;
    using A = Accumulate<T>;
    constexpr int kPack = 16 / sizeof(T);
    if (tokens > 0) {
      const bool packed = in_packs<T>(rank, grad, x, grad_x);
      const auto kernel = packed ? spectral_scale_backward_kernel<T, S, kPack>
                                 : spectral_scale_backward_kernel<T, S, 1>;
      const dim3 grid(grid_size(rank, kWarp * (packed ? kPack : 1)),
                      grid_size(segments * blocks, 1));
      launch("spectral_scale_backward", kernel, grid, dim3(kWarp, kLines), stream,
             static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const S*>(scale),
             mask, static_cast<T*>(grad_x), static_cast<A*>(partials), length, rank,
             segments * blocks, blocks);
    }
    launch("spectral_partials", spectral_partials_kernel<A>, grid_size(segments * rank, kThreads),
           kThreads, stream, static_cast<const A*>(partials), static_cast<A*>(sums), segments,
           blocks, rank);
  });
}

}  // namespace soco::cuda
