// Masked spectral scaling: y[t, i] = mask[i] ? x[t, i] * scale[i] : 0, and its gradients
//   grad_x[t, i] = mask[i] ? grad[t, i] * scale[i] : 0
//   sums[s, i] = sum over the tokens t of segment s of grad[t, i] * x[t, i],
// masked or not: what follows for scale is the sum of it over the segments where mask[i] is set.
// A segment is a run of tokens / segments tokens: a sequence, say, or everything.
// Products and sums are float32, and float64 for float64. The sum runs over blocks of
// kTokensOfAPartial tokens of a segment first, then over the blocks, each in a fixed order: the
// same result every time, however many threads there are.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace soco {

constexpr int64_t kTokensOfAPartial = 128;

// Blocks of all segments together.
inline int64_t spectral_partials(int64_t tokens, int64_t segments) {
  const int64_t length = tokens / segments;
  return segments * (length / kTokensOfAPartial + (length % kTokensOfAPartial != 0));
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
                             void* grad_x,         // (tokens, rank) of dtype, written; may be grad
                             void* sums,           // (segments, rank) float32, and float64 for
                                                   // float64, written
                             void* partials,       // (spectral_partials(..), rank) like sums
                             int64_t tokens, int64_t rank, int64_t segments, Dtype dtype,
                             Dtype scale_dtype, int threads);

}  // namespace cpu

namespace cuda {

void spectral_scale(const void* x, const void* scale, const uint8_t* mask, void* y, int64_t tokens,
                    int64_t rank, Dtype dtype, Dtype scale_dtype, void* stream);

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* sums, void* partials,
                             int64_t tokens, int64_t rank, int64_t segments, Dtype dtype,
                             Dtype scale_dtype, void* stream);

}  // namespace cuda
}  // namespace soco
