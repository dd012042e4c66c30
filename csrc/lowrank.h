// Low-rank linear layers for few tokens (decoding), several of them on one input: for each member,
// z = x down^T, y = z up^T + bias.
//
// Every dot product is summed in float32 (float64 for float64), and z stays in that type between
// the two products. Each sum runs over its inputs in one fixed order, whatever the threads, the
// number of tokens and the other members.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "dtype.h"

namespace soco {

constexpr int kMostMembers = 8;  // of a group

// One layer of a group.
struct Member {
  const void* up;          // (rows, rank) of weight_dtype
  int64_t stride;          // elements from one row of up to the next
  const float* up_scale;   // one factor per row of up, or null
  const int64_t* sources;  // null, or (out,) where pivoted: output i is z[sources[i]] where that is
                           // below rank, else the product of row sources[i] - rank; these ascend
  int64_t rank, rows, out;  // out is rows unless pivoted
};

struct LowRankGroup {
  const void* x;            // (tokens, in) of dtype
  const void* down;         // (sum of ranks, in) of weight_dtype, the members' one after the other
  const float* down_scale;  // (sum of ranks,) or null
  std::vector<Member> members;
  const void* bias;      // (sum of outs,) of dtype, or null
  const void* residual;  // shaped as y, of dtype, or null: added at the end
  void* z;  // (tokens, sum of ranks) of the type of the sums, scratch; may be null for the CPU
  void* y;  // (tokens, sum of outs), or (tokens, out) where gated; of dtype
  uint32_t* barrier;  // for CUDA: a counter that no other call uses at the same time, zero before
                      // the first; or null, and then a group takes two launches
  int64_t tokens, in;
  Dtype dtype;         // of x and y
  Dtype weight_dtype;  // the same, or int8 or float8
  bool gated;          // two members of one out: y = silu(first) * second
  bool dependent;      // for CUDA: the launch is a dependent one (sm_90 and newer; see decode.cuh)
  // For CUDA: the first column of y that each block of a grid computes, and the number of columns;
  // or null, or for another number of blocks, and then columns are shared out by their mean cost.
  std::shared_ptr<const std::vector<int64_t>> shares;
};

namespace cpu {

void low_rank_group(const LowRankGroup& group, int threads);

}  // namespace cpu

namespace cuda {

void low_rank_group(const LowRankGroup& group, void* stream);

}  // namespace cuda
}  // namespace soco
