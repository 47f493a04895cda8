#!/bin/sh
# Makes the virtual environment in .venv, or brings it up to date: packaging/setup.sh [EXTRA[,EXTRA]]
# VENV names another folder: what exports models is 2 GB that nothing else needs.
# The one slow step is compiling llama-cpp-python (one and a half to five minutes on two cores); the wheel stays in
# the user's cache, so a second checkout does not compile again.
set -eu
cd "$(dirname "$0")/.."
extra=${1:-}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
stamp=$venv/.ready-${extra:-app}

fail() { echo "edgespec: $*" >&2; exit 1; }

# What an environment depends on: what it is made from, and the processor that the engines were compiled for.
key=$( (cat pyproject.toml packaging/setup.sh packaging/wheel.sh packaging/*.cmake; uname -sm
    grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true) | cksum)
[ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && exit 0

command -v "$python" >/dev/null 2>&1 || fail "python3 is missing: on Debian, apt install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then # not there, or its making was stopped
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is missing: on Debian, apt install python3-venv"
    rm -rf "$venv"
    "$python" packaging/progress.py "making the environment" "$venv/setup.log" "$python" -m venv "$venv"
fi
found=no
for compiler in "${CXX:-}" c++ g++ clang++; do
    [ -n "$compiler" ] && command -v "$compiler" >/dev/null 2>&1 && found=yes && break
done
# pip TITLE ARGUMENTS...: install, with one line that shows how far it is.
pip() {
    title=$1
    shift
    "$venv/bin/python" packaging/progress.py "$title" "$venv/setup.log" \
        "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar "$bar" "$@"
}
# use KIND: the engine's wheel, made for this processor, if the environment has another.
use() {
    wheel=$(packaging/wheel.sh "$1" "$PWD/$venv/bin/python")
    [ "$(cat "$venv/.wheel-$1" 2>/dev/null)" = "$wheel" ] && return
    pip "installing $(basename "$wheel" | cut -d - -f 1)" --force-reinstall --no-deps "$wheel"
    echo "$wheel" > "$venv/.wheel-$1"
}
bar=off # the pip that comes with Python may know no other
"$venv/bin/python" -c 'import pip, sys; sys.exit(pip.__version__.split(".") < ["24", "1"])' || pip "updating pip" --upgrade "pip>=24.1"
bar=raw
case $venv in /*) fail "VENV must be a folder in the checkout" ;; esac
[ "$found" = yes ] || "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null ||
    fail "a C++ compiler is missing: on Debian, apt install g++; on macOS, xcode-select --install"
[ "$found" = no ] || use native
# The second engine. Its ready-made wheel is for any x86-64 processor with AVX2; compiled here it uses all that this
# one has.
ik=$(sed -n 's/^ik = \["\(.*\)"\]$/\1/p' pyproject.toml)
case ,$extra,:$(uname -sm) in
*,ik,*) use ik ;;
*:Linux\ x86_64)
    "$venv/bin/python" -c 'import importlib.metadata as m; m.version("ik-llama-cpp-python")' 2>/dev/null ||
        pip "installing ik_llama.cpp" --no-deps --only-binary ik-llama-cpp-python "$ik" ||
        echo "edgespec: no ready-made wheel of $ik for this system: only llama.cpp is used" >&2
    ;;
esac
# setuptools warns of every editable install; what matters is an error.
PYTHONWARNINGS=ignore pip "installing packages" --editable ".${extra:+[$extra]}"
echo "$key" > "$stamp"
