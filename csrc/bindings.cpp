// Everything Python can call, and build facts: pointers as integers, sizes, dtypes, threads or a
// stream. No torch header in csrc/; soco/ops.py checks everything before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "build_record.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "dtype.h"
#include "lowrank.h"
#include "philox.h"
#include "sketch.h"
#include "spectral.h"
#include "svd.h"

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

// One layer of a group in Python: up, stride, up_scale, sources, rank, rows, out.
using PassedMember =
    std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

// The weights of a group, to be run on many inputs. Whoever makes it keeps them where they are.
soco::LowRankGroup make_plan(uintptr_t down, uintptr_t down_scale,
                             const std::vector<PassedMember>& members, uintptr_t bias, int64_t in,
                             Dtype dtype, Dtype weight_dtype, bool gated, bool dependent,
                             const std::vector<int64_t>& shares) {
  soco::LowRankGroup group{};
  group.down = unpass<const void*>(down);
  group.down_scale = unpass<const float*>(down_scale);
  group.members.reserve(members.size());
  for (const auto& [up, stride, up_scale, sources, rank, rows, out] : members)
    group.members.push_back({unpass<const void*>(up), stride, unpass<const float*>(up_scale),
                             unpass<const int64_t*>(sources), rank, rows, out});
  group.bias = unpass<const void*>(bias);
  group.in = in;
  group.dtype = dtype;
  group.weight_dtype = weight_dtype;
  group.gated = gated;
  group.dependent = dependent;
  if (!shares.empty()) group.shares = std::make_shared<const std::vector<int64_t>>(shares);
  return group;
}

template <typename Where>
void bind_low_rank_group(py::module_& m, const char* name,
                         void (*kernel)(const soco::LowRankGroup&, Where)) {
  m.def(
      name,
      [kernel](const soco::LowRankGroup& plan, uintptr_t x, uintptr_t residual, uintptr_t z,
               uintptr_t y, int64_t tokens, uintptr_t barrier, Passed<Where> where) {
        soco::LowRankGroup group = plan;  // several threads may run the same plan
        group.x = unpass<const void*>(x);
        group.residual = unpass<const void*>(residual);
        group.z = unpass<void*>(z);
        group.y = unpass<void*>(y);
        group.tokens = tokens;
        group.barrier = unpass<uint32_t*>(barrier);
        kernel(group, unpass<Where>(where));
      },
      py::call_guard<py::gil_scoped_release>());
}

// The matrices of a batch and where their decompositions go.
soco::SvdBatch svd_batch(uintptr_t matrices, uintptr_t left, uintptr_t values, uintptr_t right,
                         uintptr_t sweeps, int64_t batch, int64_t rows, int64_t columns,
                         int64_t row_stride, int64_t column_stride, Dtype dtype,
                         bool sign_by_right) {
  return {unpass<const void*>(matrices),
          unpass<void*>(left),
          unpass<void*>(values),
          unpass<void*>(right),
          unpass<int32_t*>(sweeps),
          batch,
          rows,
          columns,
          row_stride,
          column_stride,
          dtype,
          sign_by_right};
}

// Single functions of the kernels, for tests against known answers.
void bind_parts(py::module_& m) {
  m.def("philox", [](std::vector<uint32_t> counter, uint32_t key0, uint32_t key1) {
    const soco::Words c = {{counter.at(0), counter.at(1), counter.at(2), counter.at(3)}};
    const soco::Words out = soco::philox(c, key0, key1);
    return std::vector<uint32_t>(out.w, out.w + 4);
  });
  m.def("widen_bits", [](uint16_t bits, Dtype dtype) {
    if (dtype == Dtype::kFloat8) return soco::widen(soco::Float8{static_cast<uint8_t>(bits)});
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
      .value("float16", Dtype::kFloat16)
      .value("int8", Dtype::kInt8)
      .value("float8", Dtype::kFloat8);
  py::class_<soco::LowRankGroup>(m, "LowRankPlan").def(py::init(&make_plan));
  m.attr("most_members") = soco::kMostMembers;
  m.def("spectral_partials", &soco::spectral_partials);
  m.attr("most_sweeps") = soco::kMostSweeps;
  m.def("svd_scratch", [](int64_t batch, int64_t rows, int64_t columns) {
    return soco::svd_blocks(batch, rows, columns) * soco::svd_scratch(rows, columns);
  });
  bind(m, "spectral_scale_cpu", soco::cpu::spectral_scale);
  bind(m, "spectral_scale_backward_cpu", soco::cpu::spectral_scale_backward);
  bind_low_rank_group(m, "low_rank_group_cpu", soco::cpu::low_rank_group);
  bind(m, "gaussian_cpu", soco::cpu::gaussian);
  py::class_<soco::SvdBatch>(m, "SvdBatch").def(py::init(&svd_batch));
  m.def(
      "batched_svd_cpu",
      [](const soco::SvdBatch& batch, uintptr_t, int threads) {
        soco::cpu::batched_svd(batch, threads);
      },
      py::call_guard<py::gil_scoped_release>());
#ifdef SOCO_HAS_CUDA
  bind(m, "spectral_scale_cuda", soco::cuda::spectral_scale);
  bind(m, "spectral_scale_backward_cuda", soco::cuda::spectral_scale_backward);
  bind_low_rank_group(m, "low_rank_group_cuda", soco::cuda::low_rank_group);
  bind(m, "gaussian_cuda", soco::cuda::gaussian);
  m.def(
      "batched_svd_cuda",
      [](const soco::SvdBatch& batch, uintptr_t scratch, uintptr_t stream) {
        soco::cuda::batched_svd(batch, unpass<void*>(scratch), unpass<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
#endif
  bind_parts(m);

  m.def("simd_level", [] { return kLevelNames[static_cast<size_t>(soco::cpu::level())]; });
  m.def("threads", [] { return soco::cpu::uses_openmp() ? "torch's OpenMP" : "own pool"; });
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
      {"simd", SOCO_BUILD_SIMD},
  };
}
