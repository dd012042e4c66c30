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
                             const uint8_t* mask, void* grad_x, void* sums, void* partials,
                             int64_t tokens, int64_t rank, int64_t segments, Dtype dtype,
                             Dtype scale_dtype, int threads) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<T>;
    const auto wide = widened<A>(scale, rank, scale_dtype);
    A* const parts = static_cast<A*>(partials);
    const int64_t length = tokens / segments;
    const int64_t blocks = spectral_partials(length, 1);  // of a segment
    parallel_tasks(threads, segments * blocks, [&](int64_t task) {
      const int64_t in_segment = task % blocks * kTokensOfAPartial;
      const int64_t rest = length - in_segment;
      const int64_t count = rest < kTokensOfAPartial ? rest : kTokensOfAPartial;
      const int64_t begin = (task / blocks * length + in_segment) * rank;
      at_level([&](auto level) {
        spectral_backward_rows<level()>(
            static_cast<const T*>(grad) + begin, static_cast<const T*>(x) + begin, wide.data(),
            mask, static_cast<T*>(grad_x) + begin, parts + task * rank, count, rank, dtype);
      });
    });
    A* const whole = static_cast<A*>(sums);
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t i = 0; i < rank; ++i) {
        A sum = 0;
        for (int64_t p = s * blocks; p < (s + 1) * blocks; ++p) sum += parts[p * rank + i];
        whole[s * rank + i] = sum;
      }
  });
}

}  // namespace soco::cpu
