// Everything Python can call, and build facts: pointers as integers, sizes, dtypes, threads or a
// stream. No torch header in csrc/; soco/ops.py checks everything before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "build_record.h"
#include "cpu/level.h"
#include "dtype.h"
#include "lowrank.h"
#include "philox.h"
#include "sketch.h"
#include "spectral.h"

namespace py = pybind11;

namespace {

using soco::Dtype;

const std::vector<std::string> kLevelNames = {"portable", "avx2", "avx512"};

// In Python a pointer is an integer.
template <typename T>
using Passed = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <typename T>
T unpass(Passed<T> value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
}

// A kernel with its own parameters, run with the interpreter's lock released.
template <typename... Args>
void bind(py::module_& m, const char* name, void (*kernel)(Args...)) {
  m.def(
      name, [kernel](Passed<Args>... args) { kernel(unpass<Args>(args)...); },
      py::call_guard<py::gil_scoped_release>());
}

// Single functions of the kernels, for tests against known answers.
void bind_parts(py::module_& m) {
  m.def("philox", [](std::vector<uint32_t> counter, uint32_t key0, uint32_t key1) {
    const soco::Words c = {{counter.at(0), counter.at(1), counter.at(2), counter.at(3)}};
    const soco::Words out = soco::philox(c, key0, key1);
    return std::vector<uint32_t>(out.w, out.w + 4);
  });
  m.def("widen_bits", [](uint16_t bits, Dtype dtype) {
    return dtype == Dtype::kBFloat16 ? soco::widen(soco::BFloat16{bits})
                                     : soco::widen(soco::Float16{bits});
  });
  m.def("narrow_bits", [](float value, Dtype dtype) {
    return dtype == Dtype::kBFloat16 ? soco::narrow<soco::BFloat16>(value).bits
                                     : soco::narrow<soco::Float16>(value).bits;
  });
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::kFloat32)
      .value("float64", Dtype::kFloat64)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float16", Dtype::kFloat16);
  m.def("spectral_partials", &soco::spectral_partials);
  bind(m, "spectral_scale_cpu", soco::cpu::spectral_scale);
  bind(m, "spectral_scale_backward_cpu", soco::cpu::spectral_scale_backward);
  bind(m, "low_rank_linear_cpu", soco::cpu::low_rank_linear);
  bind(m, "gaussian_cpu", soco::cpu::gaussian);
#ifdef SOCO_HAS_CUDA
  bind(m, "spectral_scale_cuda", soco::cuda::spectral_scale);
  bind(m, "spectral_scale_backward_cuda", soco::cuda::spectral_scale_backward);
  bind(m, "low_rank_linear_cuda", soco::cuda::low_rank_linear);
  bind(m, "gaussian_cuda", soco::cuda::gaussian);
#endif
  bind_parts(m);

  m.def("simd_level", [] { return kLevelNames[static_cast<size_t>(soco::cpu::level())]; });
  m.def("simd_levels", [] {  // those that this build has and this processor can run
    const auto best = static_cast<size_t>(soco::cpu::best_level());
    return std::vector<std::string>(kLevelNames.begin(), kLevelNames.begin() + best + 1);
  });
  m.def("use_simd_level", [](const std::string& name) {
    for (size_t level = 0; level < kLevelNames.size(); ++level)
      if (kLevelNames[level] == name)
        return soco::cpu::use_level(static_cast<soco::cpu::Level>(level));
    throw py::value_error("the SIMD levels are portable, avx2 and avx512; got " + name);
  });
  m.attr("build_record") = std::map<std::string, std::string>{
      {"version", SOCO_BUILD_VERSION},
      {"compiler", SOCO_BUILD_COMPILER},
      {"type", SOCO_BUILD_TYPE},
      {"cuda", SOCO_BUILD_CUDA},
      {"cuda_absent", SOCO_BUILD_CUDA_ABSENT},
      {"cuda_architectures", SOCO_BUILD_CUDA_ARCHITECTURES},
      {"threads", "own pool (std::thread)"},
      {"simd", SOCO_BUILD_SIMD},
  };
}
