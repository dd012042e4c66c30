#!/usr/bin/env bash
# Builds the core with AddressSanitizer and UndefinedBehaviorSanitizer, and runs the fuzzer of the
# ops on it: random shapes, strides and dtypes at every SIMD level. Takes a few minutes. Exit code 77
# where the sanitizers' libraries cannot be loaded into Python (no such library, too little memory).
#   cmake/sanitize.sh [COUNT [SEED]]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Python itself leaks at exit, and torch brings operators of its own.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1
compiler=${CXX:-c++}
libraries="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
for library in $libraries; do
  [ -e "$library" ] || { echo "there is no $library here"; exit 77; }
done
LD_PRELOAD="$libraries" python -c "import torch" || { echo "sanitizers cannot run here"; exit 77; }
cmake --preset asan -B "$work/build" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$(command -v python)" >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
cmake --build "$work/build" >"$work/build.log" || { tail -50 "$work/build.log"; exit 1; }
cp -r soco "$work/soco"
rm -f "$work"/soco/_C*.so
cp "$work"/build/_C*.so "$work/soco/"
nm -D "$work"/soco/_C*.so >"$work/symbols"
grep -q __asan_init "$work/symbols" || { echo "the core has no sanitizer"; exit 1; }
LD_PRELOAD="$libraries" PYTHONPATH="$work:tests" \
  python tests/fuzzing_ops.py --count "${1:-5000}" --seed "${2:-0}"
