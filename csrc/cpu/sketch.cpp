#include "sketch.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace soco::cpu {

void gaussian(float* omega, int64_t rows, int64_t columns, uint64_t seed, int threads) {
  constexpr int64_t kCostOfANormal = 16;  // about as much work as this many bytes of a plain copy
  parallel_rows(
      threads, rows, rows_per_task(columns * kCostOfANormal), [&](int64_t begin, int64_t end) {
        at_level([&](auto level) { gaussian_rows<level()>(omega, columns, begin, end, seed); });
      });
}

}  // namespace soco::cpu
