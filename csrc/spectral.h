// Masked spectral scaling: y[t, i] = mask[i] ? x[t, i] * scale[i] : 0, and its gradients
//   grad_x[t, i] = mask[i] ? grad[t, i] * scale[i] : 0
//   grad_scale[i] = mask[i] ? sum over t of grad[t, i] * x[t, i] : 0.
// Products and sums are float32, and float64 for float64. The sum runs over blocks of
// kTokensOfAPartial tokens first, then over the blocks, each in order: the same result every time,
// however many threads there are.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace soco {

constexpr int64_t kTokensOfAPartial = 128;

inline int64_t spectral_partials(int64_t tokens) {
  return tokens / kTokensOfAPartial + (tokens % kTokensOfAPartial != 0);
}

namespace cpu {

void spectral_scale(const void* x,        // (tokens, rank) of dtype
                    const void* scale,    // (rank,) of scale_dtype
                    const uint8_t* mask,  // (rank,), 0 or not
                    void* y,              // (tokens, rank) of dtype, written
                    int64_t tokens, int64_t rank, Dtype dtype, Dtype scale_dtype, int threads);

void spectral_scale_backward(const void* grad,     // (tokens, rank) of dtype
                             const void* x,        // (tokens, rank) of dtype
                             const void* scale,    // (rank,) of scale_dtype
                             const uint8_t* mask,  // (rank,), 0 or not
                             void* grad_x,         // (tokens, rank) of dtype, written
                             void* grad_scale,     // (rank,) of scale_dtype, written
                             void* partials,       // (spectral_partials(tokens), rank) float32, and
                                                   // float64 for float64, scratch
                             int64_t tokens, int64_t rank, Dtype dtype, Dtype scale_dtype,
                             int threads);

}  // namespace cpu

namespace cuda {

void spectral_scale(const void* x, const void* scale, const uint8_t* mask, void* y, int64_t tokens,
                    int64_t rank, Dtype dtype, Dtype scale_dtype, void* stream);

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* grad_scale, void* partials,
                             int64_t tokens, int64_t rank, Dtype dtype, Dtype scale_dtype,
                             void* stream);

}  // namespace cuda
}  // namespace soco
