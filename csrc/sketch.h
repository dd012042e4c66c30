// A matrix of standard normal numbers: element (row, column) depends on the seed and on its own
// position only, never on the matrix's size, the device, the threads or the SIMD level.
#pragma once
#include <cstdint>

namespace soco {
namespace cpu {

void gaussian(float* omega,  // (rows, columns), written
              int64_t rows, int64_t columns, uint64_t seed, int threads);

}  // namespace cpu

namespace cuda {

void gaussian(float* omega, int64_t rows, int64_t columns, uint64_t seed, void* stream);

}  // namespace cuda
}  // namespace soco
