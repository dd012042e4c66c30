// Singular value decompositions of many small matrices, A = U diag(S) V^T, by one-sided Jacobi.
//
// P' A P = Q R, columns pivoted and rows sorted by the exponents of their largest entries, then R =
// L Q'^T; plane rotations from the right make the columns of L orthogonal, L J = W diag(S). So U =
// P'^T Q W and V = P Q' J (Drmac and Veselic, LAWN 169 and 170; sorted rows: Cox and Higham, 1998).
// The Gram matrix of L is closer to a diagonal than that of A, so that fewer sweeps do, and every
// step perturbs a matrix D B by no more than eps times each row's norm: singular values far below
// the largest keep their digits where rows or columns differ in size alone.
//
// A matrix is first divided by a power of two. Then pivots below kSmallestPivot are taken for zero,
// since their squares have no digits left; what belongs to a singular value of zero is any
// orthonormal completion. Signs: the largest entry of each left vector is positive (of each right
// vector where the matrix came transposed), the first of equals. Everything runs in a fixed order:
// equal input, equal result, whatever the other matrices and however many threads.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace soco {

constexpr int kMostSweeps = 60;
constexpr int kNotFinite = -1;

// The matrices: element (i, j) of matrix b at [b * rows * columns + i * row_stride +
// j * column_stride], rows >= columns >= 1. float32 or float64.
struct SvdBatch {
  const void* matrices;
  void* left;       // (batch, columns, rows), written: the columns of U
  void* values;     // (batch, columns), written, descending
  void* right;      // (batch, columns, columns), written: the columns of V
  int32_t* sweeps;  // (batch,), written: how many it took; kMostSweeps if it did not converge,
                    // kNotFinite if the matrix holds NaN or Inf: then nothing else is written
  int64_t batch, rows, columns, row_stride, column_stride;
  Dtype dtype;
  bool sign_by_right;
};

// How many numbers of scratch a block of the CUDA kernel needs.
SOCO_SHARED int64_t svd_scratch(int64_t rows, int64_t columns) {
  return columns * rows + 3 * columns * columns + 5 * columns + 2 * rows;
}

// How many blocks that kernel runs: for each matrix one, as long as their scratch is at most 2^27
// numbers, but a few hundred in any case.
SOCO_SHARED int64_t svd_blocks(int64_t batch, int64_t rows, int64_t columns) {
  constexpr int64_t kNumbers = int64_t{1} << 27, kFew = 264;
  const int64_t many = kNumbers / svd_scratch(rows, columns);
  const int64_t most = many < kFew ? kFew : many > 65535 ? 65535 : many;
  return batch < most ? batch : most;
}

// Rows are sorted by how many powers of two they are below the largest entry: so many are told
// apart.
constexpr int kRowSizes = 512;

// Where each row goes: largest first, rows of one size in their order. starts: kRowSizes, scratch.
template <typename Exponent>
SOCO_SHARED void sort_rows(int64_t rows, Exponent exponent, int32_t* starts, int32_t* order) {
  const auto size_of = [&](int64_t i) {
    const int64_t below = -static_cast<int64_t>(exponent(i));
    return below < 0 ? 0 : below < kRowSizes ? below : kRowSizes - 1;
  };
  for (int size = 0; size < kRowSizes; ++size) starts[size] = 0;
  for (int64_t i = 0; i < rows; ++i) ++starts[size_of(i)];
  int32_t before = 0;
  for (int size = 0; size < kRowSizes; ++size) {
    const int32_t here = starts[size];
    starts[size] = before;
    before += here;
  }
  for (int64_t i = 0; i < rows; ++i) order[starts[size_of(i)]++] = static_cast<int32_t>(i);
}

// Vectors of `length` numbers are orthogonal where the cosine between them is below kHalfUlp times
// the root of this. The 30: with a few numbers, too, a rotation may leave some half units (without
// it one of 3,000 matrices of two columns was turned back and forth for ever).
template <typename A>
SOCO_SHARED A roundings(int64_t length) {
  return static_cast<A>(length + 30);
}

template <typename A>
struct JacobiLimits;
template <>
struct JacobiLimits<float> {
  static constexpr float kHalfUlp = 0x1p-24f;
  static constexpr float kSmallestPivot = 0x1p-120f;  // of a norm squared; entries are at most 1
  static constexpr float kHuge = 0x1p40f;  // of a cotangent: from here on its square is not formed
};
template <>
struct JacobiLimits<double> {
  static constexpr double kHalfUlp = 0x1p-53;
  static constexpr double kSmallestPivot = 0x1p-960;
  static constexpr double kHuge = 0x1p60;
};

namespace cpu {
void batched_svd(const SvdBatch& batch, int threads);
}

namespace cuda {
// scratch: svd_blocks(..) * svd_scratch(rows, columns) numbers of the dtype
void batched_svd(const SvdBatch& batch, void* scratch, void* stream);
}  // namespace cuda

}  // namespace soco
