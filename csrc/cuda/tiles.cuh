// Products of tokens and tiles of weights by tensor cores: 16 tokens, 8 rows of weight, and of a
// row a line of 64 bytes at a time.
#pragma once
#include <type_traits>

#include "cuda/ptx.cuh"

namespace soco::cuda::decoding {

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8;     // of a tile
constexpr int kTokens = 16;  // at most
constexpr int kLine = 64;    // bytes of a row that a warp reads at a time, 16 per lane

// Which lines of 64 bytes of a row are a warp's.
struct Lines {
  int begin, end;
};

__device__ __forceinline__ Lines lines_of(int64_t bytes, int warp) {
  const int lines = static_cast<int>((bytes + kLine - 1) / kLine);
  return {lines * warp / kWarps, lines * (warp + 1) / kWarps};
}

// Two weights, the lower 16 or 32 bits of `bits`, as a pair of T.
template <typename T, typename W>
__device__ __forceinline__ uint32_t weight_pair(uint32_t bits) {
  if constexpr (std::is_same_v<W, Int8>) {
    // The bits of b + 128 as the last of a float that begins with 2^23 are 2^23 + 128 + b.
    const float first = bits_float(0x4b000000u | ((bits & 0xffu) ^ 0x80u)) - 8388736.0f;
    const float second = bits_float(0x4b000000u | ((bits >> 8 & 0xffu) ^ 0x80u)) - 8388736.0f;
    return narrow_pair<T>(first, second);
  } else if constexpr (std::is_same_v<W, Float8>) {
    return float8_pair<T>(bits & 0xffffu);
  } else {
    return bits;
  }
}

// sums += the products of one line of 8 rows of weight with one line of tokens. The order in which
// inputs are summed is free as long as both sides have the same: lane q of four has the q-th 16
// bytes of a row, and takes its inputs in fours.
template <typename T, typename W, int kHalves>
__device__ __forceinline__ void multiply_line(float (&sums)[4],
                                              const uint4 (&tokens)[kHalves][2 / sizeof(W)],
                                              uint4 weights) {
  const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int step = 0; step < static_cast<int>(4 / sizeof(W)); ++step) {
    uint32_t a[4] = {0, 0, 0, 0}, b[2];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint4 four = tokens[half][step / 2];
      a[half] = step % 2 == 0 ? four.x : four.z;
      a[2 + half] = step % 2 == 0 ? four.y : four.w;
    }
    if constexpr (sizeof(W) == 1) {
      b[0] = weight_pair<T, W>(words[step]);
      b[1] = weight_pair<T, W>(words[step] >> 16);
    } else {
      b[0] = words[2 * step];
      b[1] = words[2 * step + 1];
    }
    multiply<T>(sums, a, b);
  }
}

// Four numbers as the sum of two in 16 bits each: a high part, and what it leaves. Where the high
// part is not finite the low one is zero, so that their sum is the high one.
template <typename T>
__device__ __forceinline__ void take_apart(const float (&values)[4], uint2& high, uint2& low) {
  uint32_t highs[2], lows[2];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    float rest[2];
    highs[pair] = narrow_pair<T>(values[2 * pair], values[2 * pair + 1]);
#pragma unroll
    for (int one = 0; one < 2; ++one) {
      const float rounded = widen(T{static_cast<uint16_t>(highs[pair] >> 16 * one)});
      const bool finite = (float_bits(rounded) & 0x7f800000u) != 0x7f800000u;
      rest[one] = finite ? values[2 * pair + one] - rounded : 0.0f;
    }
    lows[pair] = narrow_pair<T>(rest[0], rest[1]);
  }
  high = {highs[0], highs[1]};
  low = {lows[0], lows[1]};
}

}  // namespace soco::cuda::decoding
