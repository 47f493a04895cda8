#!/bin/sh
# Prints the path of an engine's wheel and compiles it unless Edgespec's cache has it:
#   packaging/wheel.sh native|portable|ik PYTHON
# native: llama-cpp-python for this processor. portable: the same with a library for each processor generation, selected
# when the program starts (models/gguf/kernels.py). ik: ik-llama-cpp-python for this processor.
# pip's cache is not used: its key does not include build flags, so that a faulty wheel would be used after a fix.
set -eu
cd "$(dirname "$0")/.."
kind=$1
python=$2
package=llama-cpp-python
include=packaging/llama.cmake
project=llama_cpp
# The processor that a wheel is for. Linux and macOS report its features differently.
processor=$(uname -sm; grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || sysctl -n machdep.cpu.brand_string 2>/dev/null || true)
flags="-DLLAVA_BUILD=OFF"
what="llama.cpp"
case $kind in
native) ;;
portable)
    # GGML_NATIVE=OFF alone would still need AVX2.
    flags="$flags -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON"
    flags="$flags -DCMAKE_INSTALL_BINDIR=llama_cpp/lib -DCMAKE_INSTALL_LIBDIR=llama_cpp/lib"
    processor=$(uname -sm)
    what="llama.cpp for all processors"
    ;;
ik)
    package=ik-llama-cpp-python
    include=packaging/ik.cmake
    project=ik_llama_cpp_python
    flags=
    what="ik_llama.cpp"
    ;;
*) echo "edgespec: wheel.sh: unknown kind '$kind' (valid: native, portable, ik)" >&2; exit 2 ;;
esac
requirement=$(sed -n "s/.*\"\($package==[^\"]*\)\".*/\1/p" pyproject.toml)
compiler=$("${CXX:-c++}" --version 2>/dev/null | head -n 1 || true)
key=$( (echo "$requirement $flags $compiler $processor"; cat "$include") | cksum | cut -d ' ' -f 1)
folder=${EDGESPEC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgespec}/wheels/$kind-$key
if ! ls "$folder"/*.whl >/dev/null 2>&1; then
    mkdir -p "$folder"
    made=$(mktemp -d "$folder/.making-XXXXXX")
    trap 'rm -rf "$made"' EXIT
    trap 'exit 130' INT TERM
    CMAKE_ARGS="$flags '-DCMAKE_PROJECT_${project}_INCLUDE=$PWD/$include'" \
        "$python" packaging/progress.py "compiling $what" "$folder/build.log" \
        "$python" -m pip --disable-pip-version-check wheel --verbose --no-deps --no-cache-dir \
        --no-binary "$package" --wheel-dir "$made" "$requirement"
    mv "$made"/*.whl "$folder/"
fi
ls "$folder"/*.whl
