// SIMD levels: the row kernels are compiled once per level, and the best one is chosen at run time.
//
// cpu/<noun>_rows.cpp is compiled with SOCO_LEVEL = 0, 1, 2 and the flags of that level (see
// CMakeLists.txt) and instantiates its functions for that level alone. Everything in those files
// is internal to them, so no function compiled for a newer processor can leak into older code.
#pragma once
#include <type_traits>

namespace soco::cpu {

enum class Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Level best_level();         // what this processor can run
Level level();              // what the kernels use: best_level(), or what use_level() set
void use_level(Level set);  // for tests and benchmarks; throws if the processor cannot run it

// Calls body with the level in use as a compile-time constant.
template <typename Body>
void at_level(Body body) {
  switch (level()) {
#ifdef SOCO_X86
    case Level::kAvx512:
      return body(std::integral_constant<Level, Level::kAvx512>());
    case Level::kAvx2:
      return body(std::integral_constant<Level, Level::kAvx2>());
#endif
    default:
      return body(std::integral_constant<Level, Level::kPortable>());
  }
}

}  // namespace soco::cpu
