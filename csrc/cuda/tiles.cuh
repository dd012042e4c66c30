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

#ifndef SOCO_HAS_FLOAT8_INSTRUCTION
// Two float8 (the lower 16 bits) as a pair of T. Their bits at the place of T's are that number but
// for the exponent's bias; multiplying puts it right, for subnormals, too.
template <typename T>
__device__ __forceinline__ uint32_t float8_pair(uint32_t two) {
  constexpr bool kHalf = std::is_same_v<T, Float16>;
  constexpr uint32_t kScale = kHalf ? 0x5c005c00u : 0x7b807b80u;  // 2^8, 2^120
  const uint32_t bits = __byte_perm(two, 0u, 0x1404);
  const uint32_t placed = (bits & 0x7f007f00u) >> (kHalf ? 1 : 4) | (bits & 0x80008000u);
  const uint32_t pair = multiply_add_pair<T>(placed, kScale, 0x80008000u);  // + -0
  const uint32_t nan = ((bits & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
  return pair | (nan - (nan >> 15)) | nan;
}
#endif

// Four weights in 8 bits as two pairs of T. An integer b becomes the difference of two numbers that
// have its bits: in float16 of 1024 + (b + 128) and 1152; in bfloat16, which has no room for 8 bits
// behind a leading one, of 128 + its lower seven and 128, or 256 where it is negative.
template <typename T, typename W>
__device__ __forceinline__ void weight_pairs(uint32_t four, uint32_t (&pairs)[2]) {
  if constexpr (std::is_same_v<W, Float8>) {
    pairs[0] = float8_pair<T>(four & 0xffffu);
    pairs[1] = float8_pair<T>(four >> 16);
  } else {
    constexpr bool kHalf = std::is_same_v<T, Float16>;
    constexpr uint32_t kMinusOne = kHalf ? 0xbc00bc00u : 0xbf80bf80u;
    const uint32_t bits = kHalf ? four ^ 0x80808080u : four, above = kHalf ? 0x64u : 0x43u;
    const uint32_t placed[2] = {__byte_perm(bits, above, 0x4140), __byte_perm(bits, above, 0x4342)};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t all = placed[pair];
      const uint32_t from = kHalf ? all : all & 0xff7fff7fu;
      const uint32_t taken = kHalf ? 0x64806480u : all & 0xff80ff80u;
      pairs[pair] = multiply_add_pair<T>(taken, kMinusOne, from);
    }
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
      weight_pairs<T, W>(words[step], b);
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
