// Compiled with floating-point contraction off: see philox.h.
#include "cuda/launch.cuh"
#include "philox.h"
#include "sketch.h"

namespace soco::cuda {
namespace {

constexpr int kThreads = 256;

// One thread per four neighbours of a row.
__global__ void gaussian_kernel(float* __restrict__ omega, int64_t rows, int64_t columns,
                                int64_t groups, uint64_t seed) {
  const int64_t count = rows * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < count;
       e += stride) {
    const int64_t row = e / groups;
    const int64_t group = e % groups;
    const Normals normals =
        normals_at(static_cast<uint64_t>(row), static_cast<uint64_t>(group), seed);
    for (int i = 0; i < 4; ++i) {
      const int64_t column = 4 * group + i;
      if (column < columns) omega[row * columns + column] = normals.n[i];
    }
  }
}

}  // namespace

void gaussian(float* omega, int64_t rows, int64_t columns, uint64_t seed, void* stream) {
  if (rows == 0 || columns == 0) return;
  const int64_t groups = columns / 4 + (columns % 4 != 0);
  launch("gaussian", gaussian_kernel, grid_size(rows * groups, kThreads), kThreads, stream, omega,
         rows, columns, groups, seed);
}

}  // namespace soco::cuda
