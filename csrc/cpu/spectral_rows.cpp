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

constexpr int64_t kColumns = 64;  // whose sums stay in registers
constexpr int64_t kTokens = 16;   // for which they do: of a row of more columns a page is open each

template <typename T>
void backward_block(const T* grad, const T* __restrict x, const Accumulate<T>* __restrict scale,
                    const uint8_t* __restrict mask, T* grad_x, Accumulate<T>* __restrict sum,
                    int64_t tokens, int64_t rank) {
  using A = Accumulate<T>;
  A sums[kColumns];
  for (int64_t i = 0; i < kColumns; ++i) sums[i] = sum[i];
  for (int64_t t = 0; t < tokens; ++t, grad += rank, x += rank, grad_x += rank) {
    // What is read of grad is read before grad_x is written, which may be the same.
    A given[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) given[i] = widen(grad[i]);
    for (int64_t i = 0; i < kColumns; ++i) sums[i] += given[i] * widen(x[i]);
    for (int64_t i = 0; i < kColumns; ++i)
      grad_x[i] = narrow<T>(mask[i] ? given[i] * scale[i] : A(0));
  }
  for (int64_t i = 0; i < kColumns; ++i) sum[i] = sums[i];
}

template <typename T>
void backward_rows(const T* grad, const T* x, const Accumulate<T>* scale, const uint8_t* mask,
                   T* grad_x, Accumulate<T>* sum, int64_t tokens, int64_t rank) {
  using A = Accumulate<T>;
  for (int64_t i = 0; i < rank; ++i) sum[i] = 0;
  for (int64_t begin = 0; begin < tokens; begin += kTokens) {
    const int64_t count = tokens - begin < kTokens ? tokens - begin : kTokens;
    const int64_t first = begin * rank;
    int64_t i = 0;
    for (; i + kColumns <= rank; i += kColumns)
      backward_block(grad + first + i, x + first + i, scale + i, mask + i, grad_x + first + i,
                     sum + i, count, rank);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = i; j < rank; ++j) {
        const int64_t at = first + t * rank + j;
        const A given = widen(grad[at]);
        sum[j] += given * widen(x[at]);
        grad_x[at] = narrow<T>(mask[j] ? given * scale[j] : A(0));
      }
  }
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

template <Level>
void spectral_backward_rows(const void* grad, const void* x, const void* scale, const uint8_t* mask,
                            void* grad_x, void* partial, int64_t tokens, int64_t rank,
                            Dtype dtype) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<T>;
    backward_rows(static_cast<const T*>(grad), static_cast<const T*>(x),
                  static_cast<const A*>(scale), mask, static_cast<T*>(grad_x),
                  static_cast<A*>(partial), tokens, rank);
  });
}

constexpr Level kLevel = static_cast<Level>(SOCO_LEVEL);
template void spectral_scale_rows<kLevel>(const void*, const void*, const uint8_t*, void*, int64_t,
                                          int64_t, Dtype);
template void spectral_backward_rows<kLevel>(const void*, const void*, const void*, const uint8_t*,
                                             void*, void*, int64_t, int64_t, Dtype);

}  // namespace soco::cpu
