#!/bin/sh
# Builds and runs the C++ tests: plain, then with the address and undefined-behaviour sanitizers. CXX names the compiler.
# Where there is a compiler for AArch64 (Debian's g++-aarch64-linux-gnu), they are built for it too.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -fopenmp -ffp-contract=fast -Wall -Wextra -Werror"
# shellcheck disable=SC2086
"${CXX:-g++}" $flags -O3 -o "$build/plain" "$here/test_csrc.cpp" &
plain=$!
# shellcheck disable=SC2086
"${CXX:-g++}" $flags -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -o "$build/sanitized" "$here/test_csrc.cpp"
wait "$plain"
echo "plain"
"$build/plain"
echo "address and undefined-behaviour sanitizers"
"$build/sanitized"
if command -v aarch64-linux-gnu-g++ >/dev/null; then
  echo "AArch64: it compiles"
  # shellcheck disable=SC2086
  aarch64-linux-gnu-g++ $flags -O1 -c -o "$build/aarch64.o" "$here/test_csrc.cpp"
fi
