#include <type_traits>

#include "cuda/launch.cuh"
#include "spectral.h"

namespace soco::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;  // columns of a block of the backward kernel
constexpr int kLines = 8;     // tokens that such a block works on at a time

template <typename T, typename S>
__global__ void spectral_scale_kernel(const T* __restrict__ x, const S* __restrict__ scale,
                                      const uint8_t* __restrict__ mask, T* __restrict__ y,
                                      int64_t count, int64_t rank) {
  using A = Accumulate<T>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < count;
       e += stride) {
    const int64_t i = e % rank;
    const A scaled = widen(x[e]) * static_cast<A>(widen(scale[i]));
    y[e] = narrow<T>(mask[i] ? scaled : A(0));
  }
}

// A block owns kColumns columns of one partial, that is of kTokensOfAPartial tokens: it writes
// their grad_x and the sum of grad * x over them.
template <typename T, typename S>
__global__ void spectral_scale_backward_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                                               const S* __restrict__ scale,
                                               const uint8_t* __restrict__ mask,
                                               T* __restrict__ grad_x,
                                               Accumulate<T>* __restrict__ partials, int64_t tokens,
                                               int64_t rank, int64_t partial_rows) {
  using A = Accumulate<T>;
  __shared__ A sums[kLines][kColumns];
  const int64_t tiles = (rank + kColumns - 1) / kColumns;
  for (int64_t p = blockIdx.y; p < partial_rows; p += gridDim.y) {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t i = tile * kColumns + threadIdx.x;
      A sum = 0;
      if (i < rank) {
        const A factor = static_cast<A>(widen(scale[i]));
        const bool kept = mask[i];
        const int64_t begin = p * kTokensOfAPartial;
        const int64_t end = begin + kTokensOfAPartial < tokens ? begin + kTokensOfAPartial : tokens;
        for (int64_t t = begin + threadIdx.y; t < end; t += kLines) {
          const A g = widen(grad[t * rank + i]);
          sum += g * widen(x[t * rank + i]);
          grad_x[t * rank + i] = narrow<T>(kept ? g * factor : A(0));
        }
      }
      sums[threadIdx.y][threadIdx.x] = sum;
      __syncthreads();
      if (threadIdx.y == 0 && i < rank) {
        A total = 0;
        for (int line = 0; line < kLines; ++line) total += sums[line][threadIdx.x];
        partials[p * rank + i] = total;
      }
      __syncthreads();
    }
  }
}

template <typename A, typename S>
__global__ void spectral_partials_kernel(const A* __restrict__ partials,
                                         const uint8_t* __restrict__ mask,
                                         S* __restrict__ grad_scale, int64_t partial_rows,
                                         int64_t rank) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rank;
       i += stride) {
    A sum = 0;
    for (int64_t p = 0; p < partial_rows; ++p) sum += partials[p * rank + i];
    grad_scale[i] = narrow<S>(static_cast<Accumulate<S>>(mask[i] ? sum : A(0)));
  }
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
  const int64_t count = tokens * rank;
  if (count == 0) return;
  visit_pair(dtype, scale_dtype, [&](auto* tag, auto* scale_tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = std::remove_pointer_t<decltype(scale_tag)>;
    launch("spectral_scale", spectral_scale_kernel<T, S>, grid_size(count, kThreads), kThreads,
           stream, static_cast<const T*>(x), static_cast<const S*>(scale), mask, static_cast<T*>(y),
           count, rank);
  });
}

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* grad_scale, void* partials,
                             int64_t tokens, int64_t rank, Dtype dtype, Dtype scale_dtype,
                             void* stream) {
  if (rank == 0) return;
  const int64_t partial_rows = spectral_partials(tokens);
  visit_pair(dtype, scale_dtype, [&](auto* tag, auto* scale_tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using S = std::remove_pointer_t<decltype(scale_tag)>;
    using A = Accumulate<T>;
    if (tokens > 0) {
      const dim3 grid(grid_size(rank, kColumns), grid_size(partial_rows, 1));
      launch("spectral_scale_backward", spectral_scale_backward_kernel<T, S>, grid,
             dim3(kColumns, kLines), stream, static_cast<const T*>(grad), static_cast<const T*>(x),
             static_cast<const S*>(scale), mask, static_cast<T*>(grad_x), static_cast<A*>(partials),
             tokens, rank, partial_rows);
    }
    launch("spectral_partials", spectral_partials_kernel<A, S>, grid_size(rank, kThreads), kThreads,
           stream, static_cast<const A*>(partials), mask, static_cast<S*>(grad_scale), partial_rows,
           rank);
  });
}

}  // namespace soco::cuda
