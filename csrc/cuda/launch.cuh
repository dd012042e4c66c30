// What every launcher needs: a bounded grid, the stream, and launch errors as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace soco::cuda {

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// Enough blocks for `work` items at `per_block` each, within the limit of a grid's second and
// third dimension too; kernels stride over the grid, so fewer blocks than items are fine.
inline unsigned grid_size(int64_t work, int64_t per_block) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t blocks = work / per_block + (work % per_block != 0);
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < kMostBlocks ? blocks : kMostBlocks));
}

inline void check(cudaError_t status, const char* kernel) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel +
                             " was not launched: " + cudaGetErrorString(status));
}

template <typename... Parameters, typename... Args>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = as_stream(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace soco::cuda
