#!/bin/sh
# Makes the virtual environment in .venv, or brings it up to date: packaging/setup.sh [EXTRA[,EXTRA]]
# VENV names another folder: what exports models is 2 GB that nothing else needs.
# The one slow step is compiling llama-cpp-python (about five minutes on two cores); pip keeps the wheel it
# built in the user's cache, so a second checkout does not compile again.
set -eu
cd "$(dirname "$0")/.."
extra=${1:-}
python=${PYTHON:-python3}
venv=${VENV:-.venv}
stamp=$venv/.ready-${extra:-app}

fail() { echo "edgespec: $*" >&2; exit 1; }

[ -e "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && exit 0

command -v "$python" >/dev/null 2>&1 || fail "python3 is missing: on Debian, apt install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"
if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is missing: on Debian, apt install python3-venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
found=no
for compiler in "${CXX:-}" c++ g++ clang++; do
    [ -n "$compiler" ] && command -v "$compiler" >/dev/null 2>&1 && found=yes && break
done
if ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
    [ "$found" = yes ] || fail "a C++ compiler is missing: on Debian, apt install g++; on macOS, xcode-select --install"
    echo "Installing. Compiling llama.cpp takes about five minutes on two cores, once." >&2
fi
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --upgrade "pip>=24.1"
# The second engine. Its wheels are for any processor with AVX2: compiled here it uses all that this one has.
ik=$(sed -n 's/^ik = \["\(.*\)"\]$/\1/p' pyproject.toml)
case ,$extra, in
*,ik,*)
    # The folder that packaging/ik.cmake installs headers to, and wheels lack.
    if [ "$found" = yes ] && ! ls "$venv"/lib/python*/site-packages/ik_llama_cpp/include >/dev/null 2>&1; then
        echo "Compiling ik_llama.cpp takes about ten minutes on two cores, once." >&2
        CMAKE_ARGS="'-DCMAKE_PROJECT_ik_llama_cpp_python_INCLUDE=$PWD/packaging/ik.cmake'" \
            pip install --force-reinstall --no-deps --no-binary ik-llama-cpp-python "$ik" ||
            echo "edgespec: compiling failed; taking a ready-made wheel" >&2
    fi
    ;;
*,dev,*) # its tests want it, and are skipped without
    pip install --only-binary ik-llama-cpp-python "$ik" ||
        echo "edgespec: no ready-made wheel of $ik for this system: its tests will be skipped" >&2
    ;;
esac
# setuptools warns of every editable install; what matters is an error.
PYTHONWARNINGS=ignore pip install --editable ".${extra:+[$extra]}"
touch "$stamp"
