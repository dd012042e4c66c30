#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/members.cuh"
#include "lowrank.h"

namespace soco::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;   // rows of weight that a block works on at a time, one per warp
constexpr int kTokens = 4;  // tokens that share one reading of a row

// sums[t] = dot(x[t], w) for up to kTokens tokens. The lanes of a warp take every 32nd input, and
// their sums are added as a tree: one fixed order. Lane 0 has the result.
template <typename X, typename W, typename A>
__device__ void dot_tokens(const X* x, int64_t x_stride, const W* w, int64_t inner, int64_t tokens,
                           A (&sums)[kTokens]) {
  for (int t = 0; t < kTokens; ++t) sums[t] = A(0);
  for (int64_t k = threadIdx.x; k < inner; k += kWarp) {
    const A wide = widen(w[k]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < tokens) sums[t] += widen(x[t * x_stride + k]) * wide;
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      sums[t] += __shfl_down_sync(0xffffffffu, sums[t], offset);
}

// z[t, row] = dot(x[t], down[row]) * scale[row], a warp per row and kTokens tokens.
template <typename T, typename W>
__global__ void reduce_kernel(const T* __restrict__ x, const W* __restrict__ down,
                              const float* __restrict__ scale, Accumulate<T>* __restrict__ z,
                              int64_t tokens, int64_t in, int64_t ranks) {
  using A = Accumulate<T>;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; row < ranks;
       row += static_cast<int64_t>(gridDim.x) * kWarps)
    for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens; first < tokens;
         first += static_cast<int64_t>(gridDim.y) * kTokens) {
      A sums[kTokens];
      dot_tokens(x + first * in, in, down + row * in, in, tokens - first, sums);
      if (threadIdx.x != 0) continue;
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        if (first + t < tokens)
          z[(first + t) * ranks + row] = scale == nullptr ? sums[t] : sums[t] * A(scale[row]);
    }
}

// Output `i` of a member with its bias, for up to kTokens tokens, in lane 0.
template <typename T, typename W>
__device__ void output(const Members& all, int number, int64_t i, const Accumulate<T>* z,
                       int64_t ranks, const T* bias, int64_t tokens,
                       Accumulate<T> (&values)[kTokens]) {
  using A = Accumulate<T>;
  const Member& member = all.member[number];
  const A* const own = z + all.z_column[number];
  int64_t source = member.sources == nullptr ? member.rank + i : member.sources[i];
  // A source that is wrong gives a wrong output, but nothing outside of up and z is read.
  const int64_t last = member.rank + member.rows - 1;
  source = source < 0 ? 0 : (source < last ? source : last);
  if (source < member.rank) {
    for (int t = 0; t < kTokens; ++t) values[t] = t < tokens ? own[t * ranks + source] : A(0);
  } else {
    const int64_t row = source - member.rank;
    const W* const up = static_cast<const W*>(member.up) + row * member.stride;
    dot_tokens(own, ranks, up, member.rank, tokens, values);
    if (member.up_scale != nullptr)
      for (int t = 0; t < kTokens; ++t) values[t] *= A(member.up_scale[row]);
  }
  if (bias != nullptr)
    for (int t = 0; t < kTokens; ++t) values[t] += widen(bias[all.column[number] + i]);
}

// y, a warp per column of it and kTokens tokens.
template <typename T, typename W>
__global__ void expand_kernel(Members all, const Accumulate<T>* __restrict__ z,
                              const T* __restrict__ bias, const T* __restrict__ residual,
                              T* __restrict__ y, int64_t tokens, bool gated) {
  using A = Accumulate<T>;
  const int64_t ranks = all.ranks, columns = all.width;
  for (int64_t column = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; column < columns;
       column += static_cast<int64_t>(gridDim.x) * kWarps) {
    int number = 0;
    if (!gated)
      while (number + 1 < all.count && column >= all.column[number + 1]) ++number;
    for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens; first < tokens;
         first += static_cast<int64_t>(gridDim.y) * kTokens) {
      const int64_t left = tokens - first;
      const A* const own = z + first * ranks;
      A values[kTokens];
      output<T, W>(all, number, column - all.column[number], own, ranks, bias, left, values);
      if (gated) {
        A factors[kTokens];
        output<T, W>(all, 1, column, own, ranks, bias, left, factors);
        for (int t = 0; t < kTokens; ++t)
          values[t] = values[t] / (A(1) + exp(-values[t])) * factors[t];
      }
      if (threadIdx.x != 0) continue;
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        if (t < left) {
          const int64_t at = (first + t) * columns + column;
          if (residual != nullptr) values[t] += widen(residual[at]);
          y[at] = narrow<T>(values[t]);
        }
    }
  }
}

template <typename T, typename W>
void run(const LowRankGroup& g, void* stream) {
  const Members all = members_of(g);
  const unsigned groups = grid_size(g.tokens, kTokens);
  const dim3 block(kWarp, kWarps);
  auto* const z = static_cast<Accumulate<T>*>(g.z);
  launch("low_rank_group, first product", reduce_kernel<T, W>,
         dim3(grid_size(all.ranks, kWarps), groups), block, stream, static_cast<const T*>(g.x),
         static_cast<const W*>(g.down), g.down_scale, z, g.tokens, g.in, all.ranks);
  launch("low_rank_group, second product", expand_kernel<T, W>,
         dim3(grid_size(all.width, kWarps), groups), block, stream, all, z,
         static_cast<const T*>(g.bias), static_cast<const T*>(g.residual), static_cast<T*>(g.y),
         g.tokens, g.gated);
}

}  // namespace

void low_rank_group(const LowRankGroup& group, void* stream) {
  if (group.members.size() > kMostMembers)
    throw std::invalid_argument("soco: too many layers in one group");
  if (decode(group, stream)) return;
  visit_types(group, [&](auto* tag, auto* weight_tag) {
    run<std::remove_pointer_t<decltype(tag)>, std::remove_pointer_t<decltype(weight_tag)>>(group,
                                                                                           stream);
  });
}

}  // namespace soco::cuda
