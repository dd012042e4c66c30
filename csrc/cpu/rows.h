// The row kernels: plain loops over a range of rows on one thread, one instance per SIMD level.
#pragma once
#include <cstdint>

#include "cpu/level.h"
#include "dtype.h"
#include "svd.h"

namespace soco::cpu {

// spectral_rows.cpp; scale is float32, and float64 for float64
template <Level>
void spectral_scale_rows(const void* x, const void* scale, const uint8_t* mask, void* y,
                         int64_t tokens, int64_t rank, Dtype dtype);
// partial (rank,), as scale: the sum over these tokens of grad * x; grad_x may be grad
template <Level>
void spectral_backward_rows(const void* grad, const void* x, const void* scale, const uint8_t* mask,
                            void* grad_x, void* partial, int64_t tokens, int64_t rank, Dtype dtype);

// lowrank_rows.cpp: sums are float32, and float64 for float64
template <Level>
void widen_row(const void* from, void* to, int64_t count, Dtype dtype);
// dots[t, row] = dot(x[t], weight[row])
template <Level>
void dot_rows(const void* x,       // (tokens, inner), rows x_stride apart, of the type of the sums
              const void* weight,  // (rows, inner), rows w_stride apart, of dtype
              void* dots,  // (tokens, rows), rows dots_stride apart, of the type of the sums
              int64_t tokens, int64_t inner, int64_t rows, int64_t x_stride, int64_t w_stride,
              int64_t dots_stride, Dtype dtype);
// values = silu(values) * factors, all of the type of the sums for dtype; silu(v) = v / (1 + e^-v)
template <Level>
void gate_rows(void* values, const void* factors, int64_t count, Dtype dtype);

// sketch_rows.cpp: rows begin .. end-1 of omega (.., columns)
template <Level>
void gaussian_rows(float* omega, int64_t columns, int64_t begin, int64_t end, uint64_t seed);

// svd_rows.cpp: one matrix of a batch, and the scratch it takes, aligned to 64 bytes
template <Level>
int64_t svd_matrix_bytes(int64_t rows, int64_t columns, Dtype dtype);
template <Level>
void svd_matrix(const SvdBatch& batch, int64_t number, void* scratch);

}  // namespace soco::cpu
