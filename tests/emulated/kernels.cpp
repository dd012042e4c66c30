// What tests call: the CUDA kernels, compiled as C++ with the headers here in the place of CUDA's.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include "lowrank.h"
#include "sketch.h"
#include "spectral.h"

extern "C" {

// Memory that ends where a page begins that must not be touched.
void* guarded(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t padded = (bytes + 15) / 16 * 16, pages = (padded + page - 1) / page + 1;
  auto* const begin = static_cast<unsigned char*>(mmap(
      nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(begin, page, PROT_NONE);
  mprotect(begin + pages * page, page, PROT_NONE);
  return begin + pages * page - padded;
}

void release(void* memory, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t padded = (bytes + 15) / 16 * 16, pages = (padded + page - 1) / page + 1;
  munmap(static_cast<unsigned char*>(memory) + padded - pages * page, (pages + 1) * page);
}

void set_machine(int multiprocessors, int shared, int major, bool refuses, uint64_t seed) {
  emulated::machine = {multiprocessors, shared, major, refuses, seed, 0, 0};
}

int launches() { return emulated::machine.launches; }
int forgotten() { return emulated::machine.forgotten; }

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
                    int weight_dtype, bool gated) {
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
  soco::cuda::low_rank_group(group, nullptr);
}

void spectral_scale(const void* x, const void* scale, const uint8_t* mask, void* y, int64_t tokens,
                    int64_t rank, int dtype, int scale_dtype) {
  soco::cuda::spectral_scale(x, scale, mask, y, tokens, rank, static_cast<soco::Dtype>(dtype),
                             static_cast<soco::Dtype>(scale_dtype), nullptr);
}

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* grad_scale, void* partials,
                             int64_t tokens, int64_t rank, int dtype, int scale_dtype) {
  soco::cuda::spectral_scale_backward(grad, x, scale, mask, grad_x, grad_scale, partials, tokens,
                                      rank, static_cast<soco::Dtype>(dtype),
                                      static_cast<soco::Dtype>(scale_dtype), nullptr);
}

void gaussian(float* omega, int64_t rows, int64_t columns, uint64_t seed) {
  soco::cuda::gaussian(omega, rows, columns, seed, nullptr);
}

}  // extern "C"
