// Philox4x32-10 and the normal numbers made from it, bit for bit the same on CPU and CUDA.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Everything
// after the integers is float32 addition, multiplication and square root, each rounded to nearest,
// in the order written here: compile with floating-point contraction off (no fused multiply-add).
#pragma once
#include <cmath>
#include <cstdint>

#include "dtype.h"

namespace soco {

struct Words {
  uint32_t w[4];
};

SOCO_SHARED uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

SOCO_SHARED Words philox(Words counter, uint32_t key0, uint32_t key1) {
  Words c = counter;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c.w[0]), low0 = 0xD2511F53u * c.w[0];
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c.w[2]), low1 = 0xCD9E8D57u * c.w[2];
    c = {{high1 ^ c.w[1] ^ key0, low1, high0 ^ c.w[3] ^ key1, low0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The natural logarithm of u in [2^-33, 1], to about one unit in the last place (the polynomial is
// Cephes' logf). u = m * 2^e with m in [sqrt(1/2), sqrt(2)).
SOCO_SHARED float log_of_uniform(float u) {
  const uint32_t offset = float_bits(u) - 0x3f3504f3u;  // the bits of sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float f = bits_float((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float square = f * f;
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float tail = p * f * square;
  tail = tail + e * -2.12194440e-4f;  // log(2) = 0.693359375 - 2.12194440e-4
  tail = tail - 0.5f * square;
  return (f + tail) + e * 0.693359375f;
}

struct Pair {
  float first, second;
};

// Box and Muller: two words to two independent standard normal numbers.
SOCO_SHARED Pair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  // u in (0, 1]: (word + 1/2) / 2^32, rounded; so |normal| <= sqrt(2 log 2^33) = 6.77.
  const float u = static_cast<float>(radius_word) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrtf(-2.0f * log_of_uniform(u));
  // The angle 2 pi word / 2^32 is a whole number of quarter turns and a rest in [-pi/4, pi/4].
  const uint32_t quarters = (angle_word + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(angle_word - (quarters << 30));
  const float angle = static_cast<float>(rest) * 1.4629180792671596e-9f;  // 2 pi / 2^32
  const float square = angle * angle;
  float sine = -1.9515295891e-4f;
  sine = sine * square + 8.3321608736e-3f;
  sine = sine * square + -1.6666654611e-1f;
  sine = sine * square * angle + angle;
  float cosine = 2.443315711809948e-5f;
  cosine = cosine * square + -1.388731625493765e-3f;
  cosine = cosine * square + 4.166664568298827e-2f;
  cosine = cosine * square * square - 0.5f * square + 1.0f;
  const bool odd = quarters & 1u;
  const uint32_t x = float_bits(odd ? sine : cosine) ^ (((quarters + 1u) & 2u) << 30);
  const uint32_t y = float_bits(odd ? cosine : sine) ^ ((quarters & 2u) << 30);
  return {radius * bits_float(x), radius * bits_float(y)};
}

struct Normals {
  float n[4];
};

// Elements (row, 4 group) .. (row, 4 group + 3) of the matrix of this seed.
SOCO_SHARED Normals normals_at(uint64_t row, uint64_t group, uint64_t seed) {
  const Words counter = {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                          static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)}};
  const Words words =
      philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const Pair a = normal_pair(words.w[0], words.w[1]);
  const Pair b = normal_pair(words.w[2], words.w[3]);
  return {{a.first, a.second, b.first, b.second}};
}

}  // namespace soco
