#include "spectral.h"

#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace soco::cpu {
namespace {

int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// scale in the type of the arithmetic, A: (rank,)
template <typename A>
std::vector<A> widened(const void* scale, int64_t rank, Dtype scale_dtype) {
  std::vector<A> wide(rank);
  visit(scale_dtype, [&](auto* tag) {
    const auto* from = static_cast<const std::remove_pointer_t<decltype(tag)>*>(scale);
    for (int64_t i = 0; i < rank; ++i) wide[i] = static_cast<A>(widen(from[i]));
  });
  return wide;
}

}  // namespace

void spectral_scale(const void* x, const void* scale, const uint8_t* mask, void* y, int64_t tokens,
                    int64_t rank, Dtype dtype, Dtype scale_dtype, int threads) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto wide = widened<Accumulate<T>>(scale, rank, scale_dtype);
    const auto rows = rows_per_task(2 * rank * bytes_of(dtype));
    parallel_rows(threads, tokens, rows, [&](int64_t begin, int64_t end) {
      at_level([&](auto level) {
        spectral_scale_rows<level()>(static_cast<const T*>(x) + begin * rank, wide.data(), mask,
                                     static_cast<T*>(y) + begin * rank, end - begin, rank, dtype);
      });
    });
  });
}

void spectral_scale_backward(const void* grad, const void* x, const void* scale,
                             const uint8_t* mask, void* grad_x, void* grad_scale, void* partials,
                             int64_t tokens, int64_t rank, Dtype dtype, Dtype scale_dtype,
                             int threads) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<T>;
    const auto wide = widened<A>(scale, rank, scale_dtype);
    A* const sums = static_cast<A*>(partials);
    parallel_rows(threads, tokens, kTokensOfAPartial, [&](int64_t begin, int64_t end) {
      at_level([&](auto level) {
        spectral_backward_rows<level()>(
            static_cast<const T*>(grad) + begin * rank, static_cast<const T*>(x) + begin * rank,
            wide.data(), mask, static_cast<T*>(grad_x) + begin * rank,
            sums + begin / kTokensOfAPartial * rank, end - begin, rank, dtype);
      });
    });
    visit(scale_dtype, [&](auto* scale_tag) {
      using S = std::remove_pointer_t<decltype(scale_tag)>;
      for (int64_t i = 0; i < rank; ++i) {
        A sum = 0;
        for (int64_t p = 0; p < spectral_partials(tokens); ++p) sum += sums[p * rank + i];
        static_cast<S*>(grad_scale)[i] =
            narrow<S>(static_cast<Accumulate<S>>(mask[i] ? sum : A(0)));
      }
    });
  });
}

}  // namespace soco::cpu
