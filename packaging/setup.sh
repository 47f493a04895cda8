#!/bin/sh
# Creates or updates the virtual environment in .venv: packaging/setup.sh [EXTRA[,EXTRA]]
# VENV selects another folder, as for the exporter, whose 2 GB of packages nothing else needs.
# The slow step is compiling llama-cpp-python (one and a half to five minutes on two cores); the wheel is kept in the
# user's cache, so a second checkout does not compile again.
set -eu
cd "$(dirname "$0")/.."
extra=${1:-}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
stamp=$venv/.ready-${extra:-app}

fail() { echo "edgespec: $*" >&2; exit 1; }

# The environment depends on its sources, and on the processor that the engines are compiled for.
key=$( (cat pyproject.toml packaging/setup.sh packaging/wheel.sh packaging/*.cmake; uname -sm
    grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true) | cksum)
[ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && exit 0

command -v "$python" >/dev/null 2>&1 || fail "python3 is missing: on Debian, apt install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed: set PYTHON=/path/to/python3"
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then # missing or incomplete
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is missing: on Debian, apt install python3-venv"
    rm -rf "$venv"
    "$python" packaging/progress.py "creating the environment" "$venv/setup.log" "$python" -m venv "$venv"
fi
found=no
for compiler in "${CXX:-}" c++ g++ clang++; do
    [ -n "$compiler" ] && command -v "$compiler" >/dev/null 2>&1 && found=yes && break
done
# pip TITLE ARGUMENTS...: install, with one line of progress.
pip() {
    title=$1
    shift
    "$venv/bin/python" packaging/progress.py "$title" "$venv/setup.log" \
        "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar "$bar" "$@"
}
# use KIND: install the engine's wheel for this processor unless the environment has it.
use() {
    wheel=$(packaging/wheel.sh "$1" "$PWD/$venv/bin/python")
    [ "$(cat "$venv/.wheel-$1" 2>/dev/null)" = "$wheel" ] && return
    pip "installing $(basename "$wheel" | cut -d - -f 1)" --force-reinstall --no-deps "$wheel"
    echo "$wheel" > "$venv/.wheel-$1"
}
bar=off # the pip of older Pythons has no other
"$venv/bin/python" -c 'import pip, sys; sys.exit(pip.__version__.split(".") < ["24", "1"])' || pip "updating pip" --upgrade "pip>=24.1"
bar=raw
case $venv in /*) fail "VENV is an absolute path: choose a folder in the checkout" ;; esac
[ "$found" = yes ] || "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null ||
    fail "a C++ compiler is missing: on Debian, apt install g++; on macOS, xcode-select --install"
[ "$found" = no ] || use native
# The second engine. Its prebuilt wheel is for any x86-64 processor with AVX2; compiled here it uses all instruction
# sets of this one.
ik=$(sed -n 's/^ik = \["\(.*\)"\]$/\1/p' pyproject.toml)
case ,$extra,:$(uname -sm) in
*,ik,*) use ik ;;
*:Linux\ x86_64)
    "$venv/bin/python" -c 'import importlib.metadata as m; m.version("ik-llama-cpp-python")' 2>/dev/null ||
        pip "installing ik_llama.cpp" --no-deps --only-binary ik-llama-cpp-python "$ik" ||
        echo "edgespec: no prebuilt wheel of $ik for this system: only llama.cpp is used" >&2
    ;;
esac
# setuptools warns about every editable install.
PYTHONWARNINGS=ignore pip "installing packages" --editable ".${extra:+[$extra]}"
echo "$key" > "$stamp"
