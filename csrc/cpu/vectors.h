// One register of the level that a row kernel is compiled for, in the vector extension of GCC and
// Clang. Included by cpu/<noun>_rows.cpp only.
#pragma once
#if SOCO_LEVEL > 0
#include <immintrin.h>
#endif

#include "dtype.h"

namespace soco::cpu {
namespace {

constexpr int kBytes = 16 << SOCO_LEVEL;  // 16, 32 or 64

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(A));

SOCO_SHARED Vec<float> load(const float* from) {
  Vec<float> v;
  memcpy(&v, from, sizeof(v));
  return v;
}
SOCO_SHARED Vec<double> load(const double* from) {
  Vec<double> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <typename A>
SOCO_SHARED void store(A* to, Vec<A> v) {
  memcpy(to, &v, sizeof(v));
}

template <typename A>
SOCO_SHARED Vec<A> filled(A value) {
  return value - Vec<A>{};
}

// The sum of the lanes: halves upon halves, in the same order whatever the instructions. And those
// of four registers at once, the last four lanes of each in an order of their own.
#if SOCO_LEVEL > 0
SOCO_SHARED __m128 halves(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
SOCO_SHARED __m128d halves(__m256d v) {
  return _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
}
#if SOCO_LEVEL == 2
SOCO_SHARED __m128 halves(__m512 v) {
  return halves(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, v, 0),
                              _mm512_maskz_extractf32x8_ps(0xff, v, 1)));
}
SOCO_SHARED __m128d halves(__m512d v) {
  return halves(_mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xf, v, 0),
                              _mm512_maskz_extractf64x4_pd(0xf, v, 1)));
}
#endif
SOCO_SHARED float total_of(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
SOCO_SHARED double total_of(__m128d v) {
  return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v)));
}
template <typename A>
SOCO_SHARED A total(Vec<A> v) {
  return total_of(halves(v));
}
SOCO_SHARED void totals_of(__m128 a, __m128 b, __m128 c, __m128 d, float* sums) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
SOCO_SHARED void totals_of(__m128d a, __m128d b, __m128d c, __m128d d, double* sums) {
  _mm_storeu_pd(sums, _mm_add_pd(_mm_unpacklo_pd(a, b), _mm_unpackhi_pd(a, b)));
  _mm_storeu_pd(sums + 2, _mm_add_pd(_mm_unpacklo_pd(c, d), _mm_unpackhi_pd(c, d)));
}
template <typename A>
SOCO_SHARED void totals(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, A* sums) {
  totals_of(halves(a), halves(b), halves(c), halves(d), sums);
}
#else
template <typename A>
SOCO_SHARED A total(Vec<A> v) {
  A lanes[kLanes<A>];
  memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}
template <typename A>
SOCO_SHARED void totals(Vec<A> a, Vec<A> b, Vec<A> c, Vec<A> d, A* sums) {
  sums[0] = total<A>(a);
  sums[1] = total<A>(b);
  sums[2] = total<A>(c);
  sums[3] = total<A>(d);
}
#endif

}  // namespace
}  // namespace soco::cpu
