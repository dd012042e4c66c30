#!/usr/bin/env bash
# Compiles every .cu for every supported architecture, warnings as errors, with the flags of the real
# build. Needs nvcc, CMake and a C++ compiler; no GPU, no Python, no torch. Usage:
#   cmake/check_cuda.sh [ARCHITECTURES] [BUILD_DIR]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
architectures=${1:-80-real;90-real;100}
build=${2:-$(mktemp -d)}
[ $# -ge 2 ] || trap 'rm -rf "$build"' EXIT

for source in "$root"/csrc/cuda/*.cu; do
  grep -q "csrc/cuda/$(basename "$source")" "$root/CMakeLists.txt" || {
    echo "check_cuda: $(basename "$source") is not in CMakeLists.txt" >&2
    exit 1
  }
done
cmake -S "$root" -B "$build" -DSOCO_PYTHON=OFF -DSOCO_CUDA=ON -DSOCO_WERROR=ON \
  "-DCMAKE_CUDA_ARCHITECTURES=$architectures" >/dev/null
cmake --build "$build" --target soco_cuda --parallel
echo "check_cuda: every kernel compiles for $architectures"
