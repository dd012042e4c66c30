#include <type_traits>

#include "cuda/launch.cuh"
#include "lowrank.h"

namespace soco::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;   // rows of weight that a block works on at a time, one per warp
constexpr int kTokens = 4;  // tokens that share one reading of a row

// y[t, row] = dot(x[t], weight[row]) + bias[row]. A warp owns one row and kTokens tokens; its lanes
// take every 32nd input, and their sums are added as a tree: one fixed order.
template <typename X, typename W, typename Y>
__global__ void linear_kernel(const X* __restrict__ x, const W* __restrict__ weight,
                              const W* __restrict__ bias, Y* __restrict__ y, int64_t tokens,
                              int64_t inner, int64_t rows) {
  using A = Accumulate<W>;
  const int lane = threadIdx.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const W* const w = weight + row * inner;
    const A shift = bias == nullptr ? A(0) : widen(bias[row]);
    for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens; first < tokens;
         first += static_cast<int64_t>(gridDim.y) * kTokens) {
      A sums[kTokens] = {};
      for (int64_t k = lane; k < inner; k += kWarp) {
        const A wide = widen(w[k]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
          if (first + t < tokens) sums[t] += widen(x[(first + t) * inner + k]) * wide;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        for (int offset = kWarp / 2; offset > 0; offset /= 2)
          sums[t] += __shfl_down_sync(0xffffffffu, sums[t], offset);
        if (lane == 0 && first + t < tokens)
          y[(first + t) * rows + row] = narrow<Y>(sums[t] + shift);
      }
    }
  }
}

template <typename X, typename W, typename Y>
void launch_linear(const X* x, const W* weight, const W* bias, Y* y, int64_t tokens, int64_t inner,
                   int64_t rows, void* stream) {
  if (tokens == 0 || rows == 0) return;
  const dim3 grid(grid_size(rows, kWarps), grid_size(tokens, kTokens));
  linear_kernel<X, W, Y><<<grid, dim3(kWarp, kWarps), 0, as_stream(stream)>>>(x, weight, bias, y,
                                                                              tokens, inner, rows);
  check_launch("low_rank_linear");
}

}  // namespace

void low_rank_linear(const void* x, const void* down, const void* up, const void* bias, void* y,
                     void* z, int64_t tokens, int64_t in, int64_t rank, int64_t out, Dtype dtype,
                     void* stream) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<T>;
    const T* const none = nullptr;
    launch_linear<T, T, A>(static_cast<const T*>(x), static_cast<const T*>(down), none,
                           static_cast<A*>(z), tokens, in, rank, stream);
    launch_linear<A, T, T>(static_cast<const A*>(z), static_cast<const T*>(up),
                           static_cast<const T*>(bias), static_cast<T*>(y), tokens, rank, out,
                           stream);
  });
}

}  // namespace soco::cuda
