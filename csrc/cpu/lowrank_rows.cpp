// Skinny products: a few rows of x against many rows of weight, several of each per pass, so that
// every weight is read and widened once for all of these tokens.
#include "cpu/rows.h"
#include "cpu/vectors.h"

#if SOCO_LEVEL > 0
#include <immintrin.h>
#endif

namespace soco::cpu {
namespace {

constexpr int kMostTokens = SOCO_LEVEL == 2 ? 8 : 4;  // AVX-512 has 32 registers, the others 16

typedef uint32_t Bits32 __attribute__((vector_size(kBytes)));

// As many 16-bit or 8-bit numbers as a register has lanes for floats, widened to 32 bits.
// AVX-512 in the masked forms, all lanes on: GCC 12 takes the plain ones for a use of
// uninitialised memory.
#if SOCO_LEVEL == 2
SOCO_SHARED __m256i words(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
SOCO_SHARED __m128i bytes(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
SOCO_SHARED Bits32 load_bits(const BFloat16* from) {
  return reinterpret_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, words(from)));
}
SOCO_SHARED Bits32 load_bits(const Float8* from) {
  return reinterpret_cast<Bits32>(_mm512_maskz_cvtepu8_epi32(0xffff, bytes(from)));
}
SOCO_SHARED Vec<float> load(const Float16* from) {
  return _mm512_maskz_cvtph_ps(0xffff, words(from));
}
SOCO_SHARED Vec<float> load(const Int8* from) {
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes(from)));
}
#elif SOCO_LEVEL == 1
SOCO_SHARED __m128i words(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
SOCO_SHARED __m128i bytes(const void* from) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(from));
}
SOCO_SHARED Bits32 load_bits(const BFloat16* from) {
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(words(from)));
}
SOCO_SHARED Bits32 load_bits(const Float8* from) {
  return reinterpret_cast<Bits32>(_mm256_cvtepu8_epi32(bytes(from)));
}
SOCO_SHARED Vec<float> load(const Float16* from) { return _mm256_cvtph_ps(words(from)); }
SOCO_SHARED Vec<float> load(const Int8* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(from)));
}
#else
template <typename T>
SOCO_SHARED Bits32 load_bits(const T* from) {
  Bits32 v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = from[lane].bits;
  return v;
}
template <typename T>
SOCO_SHARED Vec<float> load(const T* from) {
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = widen(from[lane]);
  return v;
}
#endif

SOCO_SHARED Vec<float> load(const BFloat16* from) {
  return reinterpret_cast<Vec<float>>(load_bits(from) << 16);
}

SOCO_SHARED Vec<float> load(const Float8* from) {  // as widen(Float8)
  const Bits32 bits = load_bits(from), magnitude = bits & 0x7f;
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(magnitude << 20) * 0x1p120f;
  const Bits32 nan = reinterpret_cast<Bits32>(magnitude == 0x7f) & 0x7fc00000u;
  const Bits32 sign = (bits & 0x80) << 24;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits32>(scaled) | sign | nan);
}

// The first `count` elements, zeros behind them.
template <typename T>
SOCO_SHARED auto load_some(const T* from, int64_t count) {
  T padded[kLanes<Accumulate<T>>] = {};
  for (int64_t k = 0; k < count; ++k) padded[k] = from[k];
  return load(padded);
}

// Zeros in all lanes but the last `count`.
template <typename A>
SOCO_SHARED Vec<A> last_lanes(Vec<A> v, int64_t count) {
  using Mask = decltype(v == v);
  Mask lanes;
  for (int lane = 0; lane < kLanes<A>; ++lane) lanes[lane] = lane;
  const Mask kept = lanes >= static_cast<decltype(lanes[0] + 0)>(kLanes<A> - count);
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Mask>(v) & kept);
}

// dots[t][r] = dot(x[t], w[r]) for kTokens rows of x and kRows rows of w. One accumulator per pair
// and one order of the sum, so a pair's value does not depend on the block it was computed in.
template <int kTokens, int kRows, typename W, typename A>
SOCO_SHARED void dot_block(const A* x, int64_t x_stride, const W* w, int64_t w_stride,
                           int64_t inner, A (&dots)[kTokens][kRows]) {
  constexpr int lanes = kLanes<A>;
  constexpr int step = 64 / static_cast<int>(sizeof(W));  // a line of memory, a multiple of lanes
  Vec<A> sums[kTokens][kRows] = {};
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    Vec<A> ws[kRows];
    for (int r = 0; r < kRows; ++r) ws[r] = load(w + r * w_stride + k);
    for (int t = 0; t < kTokens; ++t) {
      const Vec<A> xs = load(x + t * x_stride + k);
      for (int r = 0; r < kRows; ++r) sums[t][r] += xs * ws[r];
    }
  };
  int64_t k = 0;
  for (; k + step <= inner; k += step) {
#pragma GCC unroll 16
    for (int part = 0; part < step; part += lanes) add(k + part);
  }
  for (; k + lanes <= inner; k += lanes) add(k);
  if (k < inner) {
    const int64_t rest = inner - k;
    const auto load_rest = [&](const auto* row) __attribute__((always_inline)) {
      // A register that ends where the row ends, without the lanes that were added already.
      return inner < lanes ? load_some(row + k, rest)
                           : last_lanes<A>(load(row + inner - lanes), rest);
    };
    Vec<A> ws[kRows];
    for (int r = 0; r < kRows; ++r) ws[r] = load_rest(w + r * w_stride);
    for (int t = 0; t < kTokens; ++t) {
      const Vec<A> xs = load_rest(x + t * x_stride);
      for (int r = 0; r < kRows; ++r) sums[t][r] += xs * ws[r];
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) dots[t][r] = total<A>(sums[t][r]);
}

// e^x, to about one unit in the last place: 2^n e^r with |r| <= log(2)/2, and a polynomial for e^r
// (Cephes' expf). log(2) is the sum of a number of few bits, n times which is exact, and a rest.
// 2^n is two factors, so that what is too large becomes Inf, and what is small loses its bits one
// by one; NaN stays.
SOCO_SHARED Vec<float> exponential(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
  constexpr float kLog2 = 0.693359375F, kRest = -2.12194440e-4F, kShift = 0x1.8p23F;
  x = x > 104 ? filled(104.0F) : x;
  x = x < -104 ? filled(-104.0F) : x;
  const Vec<float> shifted = x * 1.44269504F + kShift;  // the low bits are those of n
  const Vec<float> n = shifted - kShift, r = x - n * kLog2 - n * kRest;
  Vec<float> p = filled(1.9875691500e-4F);
  for (const float next :
       {1.3981999507e-3F, 8.3334519073e-3F, 4.1665795894e-2F, 1.6666665459e-1F, 5.0000001201e-1F})
    p = p * r + next;
  p = p * r * r + r + 1;
  const Ints bits = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(filled(kShift));
  const Ints half = bits >> 1, other = bits - half;
  return p * reinterpret_cast<Vec<float>>((half + 127) << 23) *
         reinterpret_cast<Vec<float>>((other + 127) << 23);
}
SOCO_SHARED Vec<double> exponential(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

template <typename V>
SOCO_SHARED V gated(V v, V factor) {
  return v / (1 + exponential(-v)) * factor;
}

template <typename W>
struct Problem {
  using A = Accumulate<W>;
  const A* x;
  const W* weight;
  A* dots;
  int64_t inner, rows, x_stride, w_stride, dots_stride;

  // Rows `apart` from each other. Neighbours would be as good for the registers; but each of these
  // streams runs through memory without a break, row after row, so that the processor fetches
  // ahead, where rows are short, too.
  template <int kTokens, int kRows>
  void block(int64_t token, int64_t row, int64_t apart) const {
    A found[kTokens][kRows];
    dot_block<kTokens, kRows>(x + token * x_stride, x_stride, weight + row * w_stride,
                              apart * w_stride, inner, found);
    for (int t = 0; t < kTokens; ++t)
      for (int r = 0; r < kRows; ++r)
        dots[(token + t) * dots_stride + row + r * apart] = found[t][r];
  }

  template <int kTokens>
  void tokens_block(int64_t token, int64_t begin, int64_t end) const {
    constexpr int kRows = kTokens * 4 <= (SOCO_LEVEL == 2 ? 16 : 8) ? 4 : 3;
    const int64_t apart = (end - begin) / kRows, whole = begin + apart * kRows;
    for (int64_t row = begin; row < begin + apart; ++row) block<kTokens, kRows>(token, row, apart);
    for (int64_t row = whole; row < end; ++row) block<kTokens, 1>(token, row, 0);
  }

  // As many blocks of kTokens as there are, then the rest in blocks of half as many; three at once,
  // where two and one would read all weights twice.
  template <int kTokens>
  void run(int64_t token, int64_t tokens, int64_t begin, int64_t end) const {
    for (; tokens - token >= kTokens; token += kTokens) tokens_block<kTokens>(token, begin, end);
    if (kTokens == 4 && tokens - token == 3) return tokens_block<3>(token, begin, end);
    if constexpr (kTokens > 1) run<kTokens / 2>(token, tokens, begin, end);
  }

  // All tokens, one piece of the rows after the other: it stays in the cache for all of them.
  void run(int64_t tokens) const {
    constexpr int64_t kPiece = 48;  // in whole blocks of 3 and of 4 rows
    for (int64_t begin = 0; begin < rows; begin += kPiece)
      run<kMostTokens>(0, tokens, begin, rows - begin < kPiece ? rows : begin + kPiece);
  }
};

}  // namespace

template <Level>
void widen_row(const void* from, void* to, int64_t count, Dtype dtype) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<T>;
    const T* const source = static_cast<const T*>(from);
    A* const target = static_cast<A*>(to);
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) {
      const Vec<A> v = load(source + i);
      memcpy(target + i, &v, sizeof(v));
    }
    for (; i < count; ++i) target[i] = widen(source[i]);
  });
}

template <Level>
void dot_rows(const void* x, const void* weight, void* dots, int64_t tokens, int64_t inner,
              int64_t rows, int64_t x_stride, int64_t w_stride, int64_t dots_stride, Dtype dtype) {
  visit_weight(dtype, [&](auto* tag) {
    using W = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<W>;
    const Problem<W> problem{static_cast<const A*>(x),
                             static_cast<const W*>(weight),
                             static_cast<A*>(dots),
                             inner,
                             rows,
                             x_stride,
                             w_stride,
                             dots_stride};
    problem.run(tokens);
  });
}

template <Level>
void gate_rows(void* values, const void* factors, int64_t count, Dtype dtype) {
  visit(dtype, [&](auto* tag) {
    using A = Accumulate<std::remove_pointer_t<decltype(tag)>>;
    A* const to = static_cast<A*>(values);
    const A* const with = static_cast<const A*>(factors);
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>)
      store<A>(to + i, gated(load(to + i), load(with + i)));
    if (i < count) {  // the same way: a value does not depend on where it is
      const Vec<A> v = gated(load_some(to + i, count - i), load_some(with + i, count - i));
      memcpy(to + i, &v, (count - i) * sizeof(A));
    }
  });
}

constexpr Level kLevel = static_cast<Level>(SOCO_LEVEL);
template void gate_rows<kLevel>(void*, const void*, int64_t, Dtype);
template void widen_row<kLevel>(const void*, void*, int64_t, Dtype);
template void dot_rows<kLevel>(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t, Dtype);

}  // namespace soco::cpu
