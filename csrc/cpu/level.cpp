#include "cpu/level.h"

#include <atomic>
#include <stdexcept>

namespace soco::cpu {
namespace {
std::atomic<Level> in_use{best_level()};
}  // namespace

Level best_level() {
#ifdef SOCO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Level::kAvx512;
  if (avx2) return Level::kAvx2;
#endif
  return Level::kPortable;
}

Level level() { return in_use.load(std::memory_order_relaxed); }

void use_level(Level set) {
  if (set > best_level()) throw std::invalid_argument("this processor cannot run that SIMD level");
  in_use.store(set);
}

}  // namespace soco::cpu
