// A low-rank linear layer for few tokens (decoding): z = x down^T, y = z up^T + bias.
// Every dot product is summed in float32 (float64 for float64), and z stays in that type between
// the two products. Each sum runs over its inputs in one fixed order, whatever the threads.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace soco {
namespace cpu {

void low_rank_linear(const void* x,     // (tokens, in)
                     const void* down,  // (rank, in)
                     const void* up,    // (out, rank)
                     const void* bias,  // (out,), or null
                     void* y,           // (tokens, out), written
                     void* z,           // (tokens, rank) float32, and float64 for float64, scratch
                     int64_t tokens, int64_t in, int64_t rank, int64_t out, Dtype dtype,
                     int threads);

}  // namespace cpu

namespace cuda {

void low_rank_linear(const void* x, const void* down, const void* up, const void* bias, void* y,
                     void* z, int64_t tokens, int64_t in, int64_t rank, int64_t out, Dtype dtype,
                     void* stream);

}  // namespace cuda
}  // namespace soco
