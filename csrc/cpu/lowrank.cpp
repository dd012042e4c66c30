#include "lowrank.h"

#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace soco::cpu {

void low_rank_linear(const void* x, const void* down, const void* up, const void* bias, void* y,
                     void* z, int64_t tokens, int64_t in, int64_t rank, int64_t out, Dtype dtype,
                     int threads) {
  visit(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Accumulate<T>;
    std::vector<A> widened;  // x, where it is not of the type of the sums already
    const void* wide = x;
    if constexpr (!std::is_same_v<T, A>) {
      widened.resize(tokens * in);
      for (int64_t i = 0; i < tokens * in; ++i) widened[i] = widen(static_cast<const T*>(x)[i]);
      wide = widened.data();
    }
    const auto product = [&](const void* input, const void* weight, const void* shift, void* output,
                             int64_t inner, int64_t rows, bool narrow_y) {
      const auto task = rows_per_task(inner * static_cast<int64_t>(sizeof(T)));
      parallel_rows(threads, rows, task, [&](int64_t begin, int64_t end) {
        at_level([&](auto level) {
          linear_rows<level()>(input, weight, shift, output, tokens, inner, rows, begin, end, dtype,
                               narrow_y);
        });
      });
    };
    product(wide, down, nullptr, z, in, rank, false);
    product(z, up, bias, y, rank, out, true);
  });
}

}  // namespace soco::cpu
