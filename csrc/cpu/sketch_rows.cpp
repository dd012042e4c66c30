// Compiled with floating-point contraction off: see philox.h.
#include "cpu/rows.h"
#include "philox.h"

namespace soco::cpu {

template <Level>
void gaussian_rows(float* omega, int64_t columns, int64_t begin, int64_t end, uint64_t seed) {
  constexpr int kGroups = 16;  // worked on side by side, so that the compiler can use the lanes
  for (int64_t row = begin; row < end; ++row) {
    float* const line = omega + row * columns;
    for (int64_t column = 0; column < columns; column += 4 * kGroups) {
      float block[4][kGroups];
      for (int g = 0; g < kGroups; ++g) {
        const Normals normals = normals_at(row, column / 4 + g, seed);
        for (int i = 0; i < 4; ++i) block[i][g] = normals.n[i];
      }
      const int64_t rest = columns - column;
      const int count = rest < 4 * kGroups ? static_cast<int>(rest) : 4 * kGroups;
      for (int i = 0; i < count; ++i) line[column + i] = block[i % 4][i / 4];
    }
  }
}

constexpr Level kLevel = static_cast<Level>(SOCO_LEVEL);
template void gaussian_rows<kLevel>(float*, int64_t, int64_t, int64_t, uint64_t);

}  // namespace soco::cpu
