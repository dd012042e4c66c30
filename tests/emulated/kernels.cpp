// What tests call: the CUDA kernels, compiled as C++ with the headers here in the place of CUDA's.
#include <cuda_runtime.h>

#include "lowrank.h"
#include "sketch.h"
#include "spectral.h"
#include "svd.h"

extern "C" {

void* guarded(size_t bytes, bool at_the_beginning) {
  return new emulated::Guarded(bytes, at_the_beginning);
}
void* memory_of(void* guarded) { return static_cast<emulated::Guarded*>(guarded)->memory; }
void release(void* guarded) { delete static_cast<emulated::Guarded*>(guarded); }

void set_machine(int multiprocessors, int shared, int major, bool refuses, uint64_t seed) {
  emulated::machine = {multiprocessors, shared, major, refuses, seed};
}

int launches() { return emulated::machine.launches; }
int forgotten() { return emulated::machine.forgotten; }
int dependent_launches() { return emulated::machine.dependent; }
int hasty() { return emulated::machine.hasty; }
int released() { return emulated::machine.released; }
int64_t copied() { return emulated::machine.copied; }
int64_t read_ahead() { return emulated::machine.ahead; }

// The bytes at `at` are still to be written by what the stream ran before; until then NaN is there.
void written_late(void* at, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(at);
  emulated::late.push_back({at, {first, first + bytes}});
  memset(at, 0xff, bytes);
}

struct PassedMember {
  const void* up;
  int64_t stride;
  const float* up_scale;
  const int64_t* sources;
  int64_t rank, rows, out;
};

void low_rank_group(const void* x, const void* down, const float* down_scale,
                    const PassedMember* members, int count, const void* bias, const void* residual,
                    void* z, void* y, uint32_t* barrier, int64_t tokens, int64_t in, int dtype,
                    int weight_dtype, bool gated, bool dependent, const int64_t* shares,
                    int64_t share_count) {
  soco::LowRankGroup group{};
  group.x = x;
  group.down = down;
  group.down_scale = down_scale;
  for (int m = 0; m < count; ++m)
    group.members.push_back({members[m].up, members[m].stride, members[m].up_scale,
                             members[m].sources, members[m].rank, members[m].rows, members[m].out});
  group.bias = bias;
  group.residual = residual;
  group.z = z;
  group.y = y;
  group.barrier = barrier;
  group.tokens = tokens;
  group.in = in;
  group.dtype = static_cast<soco::Dtype>(dtype);
  group.weight_dtype = static_cast<soco::Dtype>(weight_dtype);
  group.gated = gated;
  group.dependent = dependent;
  if (share_count > 0)
    group.shares = std::make_shared<const std::vector<int64_t>>(shares, shares + share_count);
  soco::cuda::low_rank_group(group, nullptr);
}

void spectral_scale(const void* x, const void* scale, const uint8_t* mask, void* y, int64_t tokens,
                    int64_t rank, int dtype, int scale_dtype) {
  soco::cuda::spectral_scale(x, scale, mask, y, tokens, rank, static_cast<soco::Dtype>(dtype),
                             static_cast<soco::Dtype>(scale_dtype), nullptr);
}

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* sums, void* partials,
                             int64_t tokens, int64_t rank, int64_t segments, int dtype,
                             int scale_dtype) {
  soco::cuda::spectral_scale_backward(grad, x, scale, mask, grad_x, sums, partials, tokens, rank,
                                      segments, static_cast<soco::Dtype>(dtype),
                                      static_cast<soco::Dtype>(scale_dtype), nullptr);
}

void gaussian(float* omega, int64_t rows, int64_t columns, uint64_t seed) {
  soco::cuda::gaussian(omega, rows, columns, seed, nullptr);
}

void batched_svd(const void* matrices, void* left, void* values, void* right, int32_t* sweeps,
                 void* scratch, int64_t batch, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t column_stride, int dtype, bool sign_by_right) {
  const soco::SvdBatch given{matrices,
                             left,
                             values,
                             right,
                             sweeps,
                             batch,
                             rows,
                             columns,
                             row_stride,
                             column_stride,
                             static_cast<soco::Dtype>(dtype),
                             sign_by_right};
  soco::cuda::batched_svd(given, scratch, nullptr);
}
int64_t svd_scratch(int64_t batch, int64_t rows, int64_t columns) {
  return soco::svd_blocks(batch, rows, columns) * soco::svd_scratch(rows, columns);
}

}  // extern "C"
