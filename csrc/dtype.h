// The dtypes of the core, and the 16-bit floats: in plain bit arithmetic, and by the instructions
// that GPUs have for the same.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>

// Functions that kernels on both sides share. They are `static`, so that the copies compiled with
// AVX-512 flags can never be picked by the linker for code that runs on an older processor.
#ifdef __CUDACC__
#define SOCO_SHARED static __forceinline__ __host__ __device__
#else
#define SOCO_SHARED static inline __attribute__((always_inline))
#endif

namespace soco {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8, kFloat8 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Of weights alone, with a factor per row beside them.
struct Int8 {
  int8_t value;
};
struct Float8 {  // e4m3fn: four bits of exponent, three of mantissa, no Inf
  uint8_t bits;
};

// The type that sums are kept in: float, but double for double.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

SOCO_SHARED uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SOCO_SHARED float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// widen: exact, to the type sums are kept in.
SOCO_SHARED float widen(float value) { return value; }
SOCO_SHARED double widen(double value) { return value; }
SOCO_SHARED float widen(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
SOCO_SHARED float widen(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t exponent = value.bits & 0x7c00u;
  uint32_t bits = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (exponent == 0x7c00u) {
    bits += (255u - 31u) << 23;  // Inf and NaN keep the largest exponent
  } else if (exponent != 0) {
    bits += (127u - 15u) << 23;  // the exponent's bias moves from 15 to 127
  } else {
    bits = float_bits(bits_float(bits + (113u << 23)) - bits_float(113u << 23));  // subnormal
  }
  return bits_float(bits | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
#endif
}
SOCO_SHARED float widen(Int8 value) { return static_cast<float>(value.value); }
SOCO_SHARED float widen(Float8 value) {
  // The bits at the place of a float's are that number but for the exponent's bias (7, not 127);
  // multiplying puts it right, for subnormals, too.
  const uint32_t magnitude = value.bits & 0x7fu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x80u) << 24;
  const float scaled = bits_float(magnitude << 20) * 0x1p120f;
  return magnitude == 0x7fu ? bits_float(0x7fc00000u) : bits_float(float_bits(scaled) | sign);
}

// narrow<T>: round to nearest even; what is too large becomes Inf, NaN stays NaN.
template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
  SOCO_SHARED float from(float value) { return value; }
};
template <>
struct Narrow<double> {
  SOCO_SHARED double from(double value) { return value; }
};
template <>
struct Narrow<BFloat16> {
  SOCO_SHARED BFloat16 from(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
  }
};
template <>
struct Narrow<Float16> {
  SOCO_SHARED Float16 from(float value) {
#ifdef __CUDA_ARCH__
    Float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t sign = (float_bits(value) >> 16) & 0x8000u;
    const uint32_t bits = float_bits(value) & 0x7fffffffu;
    uint32_t rounded;
    if (bits >= 0x47800000u) {  // 65536 and more, Inf, NaN
      rounded = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (bits < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 lets the adder round
      rounded = float_bits(bits_float(bits) + 0.5f) - float_bits(0.5f);
    } else {
      rounded = (bits - ((127u - 15u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | rounded)};
#endif
  }
};
template <typename T>
SOCO_SHARED T narrow(Accumulate<T> value) {
  return Narrow<T>::from(value);
}

// visit(dtype, body): calls body with a null pointer of the C++ type, `auto* tag`.
template <typename Body>
static inline void visit(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(static_cast<float*>(nullptr));
    case Dtype::kFloat64:
      return body(static_cast<double*>(nullptr));
    case Dtype::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return body(static_cast<Float16*>(nullptr));
    default:
      throw std::invalid_argument("soco: not a dtype to compute in");
  }
}

// The same for the dtypes that weights may have.
template <typename Body>
static inline void visit_weight(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kInt8:
      return body(static_cast<Int8*>(nullptr));
    case Dtype::kFloat8:
      return body(static_cast<Float8*>(nullptr));
    default:
      return visit(dtype, body);
  }
}

}  // namespace soco
