#!/bin/sh
# Builds dist/edgespec-VERSION-PLATFORM, a folder that runs without Python, and dist/edgespec, a link to its
# program: packaging/binary.sh. It uses an environment of its own (build/venv), because the developer's has a
# llama.cpp for this processor only.
set -eu
cd "$(dirname "$0")/.."
fail() { echo "edgespec: $*" >&2; exit 1; }
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed: set PYTHON=/path/to/python3"
command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || fail "a C++ compiler is missing: on Debian, apt install g++"
command -v objdump >/dev/null 2>&1 || fail "objdump is missing: on Debian, apt install binutils"

# The build must depend on the commit only, not on the time or on hash order.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH PYTHONHASHSEED=0
umask 022

venv=build/venv
tools() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check install --constraint packaging/constraints.txt "$@"; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
wheel=$(packaging/wheel.sh portable "$PWD/$venv/bin/python")
key=$(basename "$(dirname "$wheel")")
if [ "$(cat "$venv/.wheel" 2>/dev/null)" != "$key" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    tools pip "$wheel"
    echo "$key" > "$venv/.wheel"
fi
# setuptools would include files of earlier builds from these folders, also deleted modules.
rm -rf build/lib build/bdist.*
tools pyinstaller cyclonedx-python-lib "$wheel" .
tools --force-reinstall --no-deps .
ls "$venv"/lib/python*/site-packages/llama_cpp/lib/*ggml-cpu-* >/dev/null 2>&1 ||
    fail "build/venv has a llama.cpp for this processor only: delete build/venv and try again"

version=$("$venv/bin/python" -P -c 'import edgespec; print(edgespec.__version__)')
platform=$(uname -s | tr "[:upper:]" "[:lower:]")-$(uname -m)
name=edgespec-$version-$platform
rm -rf "dist/$name" dist/edgespec build/dist
mkdir -p dist
# -P, because the folder `edgespec` here is not the package.
"$venv/bin/python" -P -m PyInstaller --noconfirm --clean --log-level ERROR --workpath build/pyinstaller --distpath build/dist packaging/edgespec.spec
"$venv/bin/python" -P packaging/notices.py build/pyinstaller/edgespec build/dist/edgespec
"$venv/bin/python" -P packaging/man.py build/dist/edgespec/share
cp LICENSE packaging/install.sh build/dist/edgespec/
cp -R packaging/share build/dist/edgespec/
mv build/dist/edgespec "dist/$name"
ln -s "$name/edgespec" dist/edgespec
echo "dist/$name"
