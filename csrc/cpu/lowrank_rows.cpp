// Skinny products: a few rows of x against many rows of weight, several of each per pass, so that
// every weight is read and widened once for all of these tokens.
#include "cpu/rows.h"

#if SOCO_LEVEL > 0
#include <immintrin.h>
#endif

namespace soco::cpu {
namespace {

// One register: 16, 32 or 64 bytes, in the vector extension of GCC and Clang.
constexpr int kBytes = 16 << SOCO_LEVEL;
constexpr int kMostTokens = SOCO_LEVEL == 2 ? 8 : 4;  // AVX-512 has 32 registers, the others 16

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

typedef uint16_t Bits16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kBytes)));

SOCO_SHARED Vec<float> load(const BFloat16* from) {
  Bits16 bits;
  memcpy(&bits, from, sizeof(bits));
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

SOCO_SHARED Vec<float> load(const Float16* from) {
#if SOCO_LEVEL == 2
  // The masked form, all lanes on: GCC 12 takes the plain one for a use of uninitialised memory.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif SOCO_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = widen(from[lane]);
  return v;
#endif
}

// The first `count` elements, zeros behind them.
template <typename T>
SOCO_SHARED auto load_some(const T* from, int64_t count) {
  T padded[kLanes<Accumulate<T>>] = {};
  for (int64_t k = 0; k < count; ++k) padded[k] = from[k];
  return load(padded);
}

template <typename A>
SOCO_SHARED A total(Vec<A> v) {
  A lanes[kLanes<A>];
  memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// dots[t][r] = dot(x[t], w[r]) for kTokens rows of x and kRows rows of w. One accumulator per pair
// and one order of the sum, so a pair's value does not depend on the block it was computed in.
template <int kTokens, int kRows, typename W, typename A>
SOCO_SHARED void dot_block(const A* x, const W* w, int64_t inner, A (&dots)[kTokens][kRows]) {
  constexpr int lanes = kLanes<A>;
  Vec<A> sums[kTokens][kRows] = {};
  int64_t k = 0;
  for (; k + lanes <= inner; k += lanes) {
    Vec<A> ws[kRows];
    for (int r = 0; r < kRows; ++r) ws[r] = load(w + r * inner + k);
    for (int t = 0; t < kTokens; ++t) {
      const Vec<A> xs = load(x + t * inner + k);
      for (int r = 0; r < kRows; ++r) sums[t][r] += xs * ws[r];
    }
  }
  if (k < inner) {
    Vec<A> ws[kRows];
    for (int r = 0; r < kRows; ++r) ws[r] = load_some(w + r * inner + k, inner - k);
    for (int t = 0; t < kTokens; ++t) {
      const Vec<A> xs = load_some(x + t * inner + k, inner - k);
      for (int r = 0; r < kRows; ++r) sums[t][r] += xs * ws[r];
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) dots[t][r] = total<A>(sums[t][r]);
}

template <typename W>
struct Problem {
  using A = Accumulate<W>;
  const A* x;
  const W* weight;
  const W* bias;
  void* y;  // of W where narrow_y, else of A
  int64_t inner, rows;
  bool narrow_y;

  template <int kTokens, int kRows>
  void block(int64_t token, int64_t row) const {
    A dots[kTokens][kRows];
    dot_block<kTokens, kRows>(x + token * inner, weight + row * inner, inner, dots);
    for (int t = 0; t < kTokens; ++t)
      for (int r = 0; r < kRows; ++r) {
        const A value = dots[t][r] + (bias ? widen(bias[row + r]) : A(0));
        const int64_t at = (token + t) * rows + row + r;
        if (narrow_y)
          static_cast<W*>(y)[at] = narrow<W>(value);
        else
          static_cast<A*>(y)[at] = value;
      }
  }

  template <int kTokens>
  void tokens_block(int64_t token, int64_t begin, int64_t end) const {
    constexpr int kRows = kTokens * 4 <= (SOCO_LEVEL == 2 ? 16 : 8) ? 4 : 3;
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) block<kTokens, kRows>(token, row);
    for (; row < end; ++row) block<kTokens, 1>(token, row);
  }

  // As many blocks of kTokens as there are, then the rest in blocks of half as many.
  template <int kTokens>
  void run(int64_t token, int64_t tokens, int64_t begin, int64_t end) const {
    for (; tokens - token >= kTokens; token += kTokens) tokens_block<kTokens>(token, begin, end);
    if constexpr (kTokens > 1) run<kTokens / 2>(token, tokens, begin, end);
  }
};

}  // namespace

template <Level>
void linear_rows(const void* x, const void* weight, const void* bias, void* y, int64_t tokens,
                 int64_t inner, int64_t rows, int64_t begin, int64_t end, Dtype dtype,
                 bool narrow_y) {
  visit(dtype, [&](auto* tag) {
    using W = std::remove_pointer_t<decltype(tag)>;
    const Problem<W> problem{static_cast<const Accumulate<W>*>(x),
                             static_cast<const W*>(weight),
                             static_cast<const W*>(bias),
                             y,
                             inner,
                             rows,
                             narrow_y};
    problem.template run<kMostTokens>(0, tokens, begin, end);
  });
}

constexpr Level kLevel = static_cast<Level>(SOCO_LEVEL);
template void linear_rows<kLevel>(const void*, const void*, const void*, void*, int64_t, int64_t,
                                  int64_t, int64_t, int64_t, Dtype, bool);

}  // namespace soco::cpu
