// One register of the level that a row kernel is compiled for, in the vector extension of GCC and
// Clang. Included by cpu/<noun>_rows.cpp only.
#pragma once
#if SOCO_LEVEL > 0
#include <immintrin.h>
#endif

#include <cmath>

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

// 1 / sqrt(v), and about 1 / v.
#if SOCO_LEVEL == 2
SOCO_SHARED Vec<float> inverse_root(Vec<float> v) {
  const Vec<float> root = _mm512_maskz_rsqrt14_ps(0xffff, v);
  return root + root * (0.5F - 0.5F * v * root * root);
}
SOCO_SHARED Vec<double> inverse_root(Vec<double> v) {
  Vec<double> root = _mm512_maskz_rsqrt14_pd(0xff, v);
  root = root + root * (0.5 - 0.5 * v * root * root);
  return root + root * (0.5 - 0.5 * v * root * root);
}
SOCO_SHARED Vec<float> about_inverse(Vec<float> v) { return _mm512_maskz_rcp14_ps(0xffff, v); }
SOCO_SHARED Vec<double> about_inverse(Vec<double> v) { return _mm512_maskz_rcp14_pd(0xff, v); }
#else
template <typename V>
SOCO_SHARED V about_inverse(V v) {
  return 1 / v;
}
#if SOCO_LEVEL == 1
SOCO_SHARED Vec<float> inverse_root(Vec<float> v) { return 1 / _mm256_sqrt_ps(v); }
SOCO_SHARED Vec<double> inverse_root(Vec<double> v) { return 1 / _mm256_sqrt_pd(v); }
#else
template <typename V>
SOCO_SHARED V inverse_root(V v) {
  for (size_t lane = 0; lane < sizeof(v) / sizeof(v[0]); ++lane) v[lane] = 1 / std::sqrt(v[lane]);
  return v;
}
#endif
#endif

// The halves of a register exchanged; and each lane where the one before it was, in a register or
// in each half of it.
#if SOCO_LEVEL == 2
SOCO_SHARED Vec<float> halves_exchanged(Vec<float> v) {
  return _mm512_maskz_shuffle_f32x4(0xffff, v, v, 0x4e);
}
SOCO_SHARED Vec<double> halves_exchanged(Vec<double> v) {
  return _mm512_maskz_shuffle_f64x2(0xff, v, v, 0x4e);
}
SOCO_SHARED Vec<float> halves_advanced(Vec<float> v) {
  const __m512i from = _mm512_set_epi32(8, 15, 14, 13, 12, 11, 10, 9, 0, 7, 6, 5, 4, 3, 2, 1);
  return _mm512_maskz_permutexvar_ps(0xffff, from, v);
}
SOCO_SHARED Vec<double> halves_advanced(Vec<double> v) {
  return _mm512_maskz_permutex_pd(0xff, v, 0x39);
}
#elif SOCO_LEVEL == 1
SOCO_SHARED Vec<float> lanes_advanced(Vec<float> v) {
  return _mm256_permutevar8x32_ps(v, _mm256_set_epi32(0, 7, 6, 5, 4, 3, 2, 1));
}
SOCO_SHARED Vec<double> lanes_advanced(Vec<double> v) { return _mm256_permute4x64_pd(v, 0x39); }
#endif

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

#if SOCO_LEVEL == 2
SOCO_SHARED void totals_of_eight(const __m512* of, float* sums) {
  const auto quarters = [](__m512 a, __m512 b) {  // two of a, two of b
    return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44) +
           _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee);
  };
  const auto each_quarter = [](__m512 a, __m512 b) {
    return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88) +
           _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd);
  };
  const __m512 even = each_quarter(quarters(of[0], of[2]), quarters(of[4], of[6]));
  const __m512 odd = each_quarter(quarters(of[1], of[3]), quarters(of[5], of[7]));
  const __m512 twos =
      _mm512_maskz_unpacklo_ps(0xffff, even, odd) + _mm512_maskz_unpackhi_ps(0xffff, even, odd);
  const __m512 ones = twos + _mm512_maskz_permute_ps(0xffff, twos, 0x4e);
  const __m512i first_two = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 13, 12, 9, 8, 5, 4, 1, 0);
  const __m512 packed = _mm512_maskz_permutexvar_ps(0xffff, first_two, ones);
  _mm256_storeu_ps(sums, _mm512_maskz_extractf32x8_ps(0xff, packed, 0));
}
#endif

// The same for `many` registers, a multiple of four.
template <typename A, int many>
SOCO_SHARED void totals(const Vec<A>* of, A* sums) {
#if SOCO_LEVEL == 2
  if constexpr (many == 8 && kLanes<A> == 16) return totals_of_eight(of, sums);
#endif
  for (int i = 0; i < many; i += 4) totals<A>(of[i], of[i + 1], of[i + 2], of[i + 3], sums + i);
}

}  // namespace
}  // namespace soco::cpu
