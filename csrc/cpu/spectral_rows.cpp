#include "cpu/rows.h"

namespace soco::cpu {
namespace {

template <typename T>
void scale_rows(const T* __restrict x, const Accumulate<T>* __restrict scale,
                const uint8_t* __restrict mask, T* __restrict y, int64_t tokens, int64_t rank) {
  for (int64_t t = 0; t < tokens; ++t, x += rank, y += rank)
    for (int64_t i = 0; i < rank; ++i) {
      const Accumulate<T> scaled = widen(x[i]) * scale[i];
      y[i] = narrow<T>(mask[i] ? scaled : Accumulate<T>(0));
    }
}

template <typename T>
void backward_rows(const T* __restrict grad, const T* __restrict x, Accumulate<T>* __restrict sum,
                   int64_t tokens, int64_t rank) {
  for (int64_t i = 0; i < rank; ++i) sum[i] = 0;
  for (int64_t t = 0; t < tokens; ++t, grad += rank, x += rank)
    for (int64_t i = 0; i < rank; ++i) sum[i] += widen(grad[i]) * widen(x[i]);
}

}  // namespace

template <Level>
void spectral_scale_rows(const void* x, const void* scale, const uint8_t* mask, void* y,
                         int64_t tokens, int64_t rank, Dtype dtype) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    scale_rows(static_cast<const T*>(x), static_cast<const Accumulate<T>*>(scale), mask,
               static_cast<T*>(y), tokens, rank);
  });
}

template <Level level>
void spectral_backward_rows(const void* grad, const void* x, const void* scale, const uint8_t* mask,
                            void* grad_x, void* partial, int64_t tokens, int64_t rank,
                            Dtype dtype) {
  spectral_scale_rows<level>(grad, scale, mask, grad_x, tokens, rank, dtype);
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    backward_rows(static_cast<const T*>(grad), static_cast<const T*>(x),
                  static_cast<Accumulate<T>*>(partial), tokens, rank);
  });
}

constexpr Level kLevel = static_cast<Level>(SOCO_LEVEL);
template void spectral_scale_rows<kLevel>(const void*, const void*, const uint8_t*, void*, int64_t,
                                          int64_t, Dtype);
template void spectral_backward_rows<kLevel>(const void*, const void*, const void*, const uint8_t*,
                                             void*, void*, int64_t, int64_t, Dtype);

}  // namespace soco::cpu
