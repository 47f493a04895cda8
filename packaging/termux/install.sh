#!/data/data/com.termux/files/usr/bin/sh
# Installs Edgespec on Android, in Termux, from this source: sh packaging/termux/install.sh [--uninstall]
# Not tested on a phone; reading Android's sensors is tested with recordings (tests/edgespec/machine/test_sensors.py).
# Compiles llama.cpp for the phone: ten to thirty minutes, and about 2 GB of space. Termux must be the version from
# F-Droid; the app Termux:API, with `pkg install termux-api`, adds battery and temperature.
set -eu
fail() { echo "edgespec: $*" >&2; exit 1; }
[ -n "${TERMUX_VERSION:-}" ] || fail "this is not Termux: use packaging/setup.sh"
cd "$(dirname "$0")/../.."
place=$HOME/.local/lib/edgespec
if [ "${1:-}" = --uninstall ]; then
    rm -rf "$place" "$PREFIX/bin/edgespec"
    echo "removed; models and conversations are kept"
    exit
fi
# Packages without wheels for Android, as built by Termux.
pkg install -y python python-pip python-numpy python-psutil python-cryptography rust clang cmake ninja binutils patchelf
python -m venv --system-site-packages "$place"
pip="$place/bin/python -m pip --disable-pip-version-check"
# Half the cores: compiling on all of them exceeds the memory of a phone.
CMAKE_BUILD_PARALLEL_LEVEL=$(($(nproc) / 2 + 1)) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF" \
    $pip install --no-binary llama-cpp-python "$(sed -n 's/^ *"\(llama-cpp-python==[^"]*\)",$/\1/p' pyproject.toml)"
$pip install .
ln -sf "$place/bin/edgespec" "$PREFIX/bin/edgespec"
echo "edgespec chat --pull    # fetches a model that fits the phone"
