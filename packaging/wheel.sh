#!/bin/sh
# Prints the path of a llama-cpp-python wheel that runs on any processor of this architecture, and compiles it
# (about ten minutes on two cores) unless the user's cache has it: packaging/wheel.sh PYTHON
set -eu
cd "$(dirname "$0")/.."
python=$1
requirement=$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)",$/\1/p' pyproject.toml)
# One library a processor generation, chosen when the program starts (models/llamacpp.py). GGML_NATIVE=OFF
# alone would still need AVX2.
flags="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAVA_BUILD=OFF"
flags="$flags -DCMAKE_INSTALL_BINDIR=llama_cpp/lib -DCMAKE_INSTALL_LIBDIR=llama_cpp/lib"
key=$( (echo "$requirement $flags $(uname -sm)"; cat packaging/portable.cmake) | cksum | cut -d ' ' -f 1)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/edgespec/wheels/$key
if ! ls "$folder"/*.whl >/dev/null 2>&1; then
    echo "Compiling llama.cpp for all processors takes about ten minutes on two cores, once." >&2
    mkdir -p "$folder"
    made=$(mktemp -d "$folder/.making-XXXXXX")
    trap 'rm -rf "$made"' EXIT
    # Never a wheel from pip's cache: that may be built for this machine alone.
    CMAKE_ARGS="$flags '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$PWD/packaging/portable.cmake'" \
        "$python" -m pip --quiet --disable-pip-version-check wheel --no-deps --no-cache-dir \
        --no-binary llama-cpp-python --wheel-dir "$made" "$requirement" >&2
    mv "$made"/*.whl "$folder/"
fi
ls "$folder"/*.whl
