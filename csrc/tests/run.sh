#!/bin/sh
# Builds and runs the C++ tests: plain, then with the address and undefined-behaviour sanitizers. CXX names the compiler.
# Compiles them and the binding for AArch64 too: with Debian's g++-aarch64-linux-gnu, else with zig where PYTHON (python3)
# has the package ziglang. The binding takes PYTHON's package nanobind, and the headers of this machine's Python, which on
# 64-bit Linux are the same for both. What has to be left out is said.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
CXX=${CXX:-g++}
PYTHON=${PYTHON:-python3}
export OMP_WAIT_POLICY=passive  # threads beyond the processors' number would only wait, busily
flags="-std=c++17 -fopenmp -ffp-contract=fast -Wall -Wextra -Werror"

aarch64() {
  if command -v aarch64-linux-gnu-g++ >/dev/null; then
    with=aarch64-linux-gnu-g++ compile=aarch64-linux-gnu-g++
  elif "$PYTHON" -c "import ziglang" 2>/dev/null; then
    with=zig compile="$PYTHON -m ziglang c++ -target aarch64-linux-gnu"
    if omp=$("$CXX" -print-file-name=include/omp.h) && [ -f "$omp" ]; then  # zig has none of its own
      mkdir "$build/include" && cp "$omp" "$build/include" && compile="$compile -isystem $build/include"
    else
      flags=$(echo "$flags" | sed 's/-fopenmp//')
      echo "AArch64: without OpenMP, whose header $CXX does not have"
    fi
  else
    echo "AArch64: NOT compiled, as there is neither aarch64-linux-gnu-g++ nor the package ziglang for $PYTHON"
    return
  fi
  # shellcheck disable=SC2086
  $compile $flags -O0 -c -o "$build/aarch64.o" "$here/test_csrc.cpp"
  echo "AArch64: the tests compile, with $with"
  if nanobind=$("$PYTHON" -m nanobind --include_dir 2>/dev/null); then
    headers=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_paths()['include'])")
    # shellcheck disable=SC2086
    $compile $flags -O0 -c -o "$build/aarch64.o" -isystem "$nanobind" -isystem "$headers" "$here/../module.cpp"
    echo "AArch64: the binding compiles"
  else
    echo "AArch64: the binding is NOT compiled, as $PYTHON has no nanobind"
  fi
}

plain() {
  # shellcheck disable=SC2086
  "$CXX" $flags -O3 -o "$build/plain" "$here/test_csrc.cpp"
  "$build/plain"
  aarch64
}

plain >"$build/plain.txt" 2>&1 &
beside=$!
# shellcheck disable=SC2086
"$CXX" $flags -Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -o "$build/sanitized" "$here/test_csrc.cpp"
echo "address and undefined-behaviour sanitizers"
"$build/sanitized" brief
status=0
wait "$beside" || status=$?
echo "plain"
cat "$build/plain.txt"
exit "$status"
