#!/bin/sh
# Installs the unpacked program for one user, without root: ./install.sh [--prefix FOLDER] [--uninstall]
#   FOLDER/lib/edgespec-VERSION-PLATFORM   the program, and the models that came with it
#   FOLDER/bin/edgespec                    a link to it; FOLDER/share: manual page, completions, desktop entry
# and user units for systemd. FOLDER is ~/.local if it is not given. What the program wrote (conversations,
# models, settings) is never touched.
set -eu
fail() { echo "edgespec: $*" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd -P)
prefix=${HOME:?}/.local
units=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
uninstall=no
while [ $# -gt 0 ]; do
    case $1 in
    --prefix) [ $# -gt 1 ] || fail "--prefix needs a folder"; prefix=$2; shift ;;
    --prefix=*) prefix=${1#--prefix=} ;;
    --uninstall) uninstall=yes ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit ;;
    *) fail "unknown option $1: there are --prefix FOLDER and --uninstall" ;;
    esac
    shift
done
case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
# The units and the desktop entry name it, each with quoting rules of its own.
case $prefix in *[!A-Za-z0-9/._\ +-]*) fail "--prefix: choose a folder of plain letters, digits and . _ + -" ;; esac
list=$prefix/lib/edgespec-files

# Deletes what an earlier run wrote down, and nothing outside the places that one writes to.
remove() {
    [ -f "$list" ] || return 0
    while IFS= read -r path; do
        case $path in
        *..*) ;;
        "$prefix"/lib/edgespec-*) rm -rf "$path" ;;
        "$prefix"/bin/edgespec | "$prefix"/share/* | "$units"/edgespec.*) rm -f "$path" ;;
        esac
    done < "$list"
    rm -f "$list"
}

if [ "$uninstall" = yes ]; then
    [ -f "$list" ] || fail "nothing of Edgespec is installed in $prefix"
    systemctl --user disable --now edgespec.socket edgespec.service >/dev/null 2>&1 || true
    remove
    echo "Removed from $prefix. Models, conversations and settings in your own folders are where they were."
    exit
fi

[ -x "$here/edgespec" ] && [ -d "$here/_internal" ] || fail "the program is not beside this script: run it in the unpacked folder"
version=$("$here/edgespec" --version) || fail "the program does not run on this system"
target=$prefix/lib/edgespec-${version#edgespec }-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
[ "$here" != "$target" ] || fail "this is the installed copy: run the script in the unpacked folder, or with --uninstall"
mkdir -p "$prefix/lib" "$prefix/bin" 2>/dev/null || fail "cannot write in $prefix: choose another --prefix"
made=$(mktemp -d "$prefix/lib/.edgespec-XXXXXX") || fail "cannot write in $prefix: choose another --prefix"
trap 'rm -rf "$made"' EXIT
cp -R "$here/." "$made/" 2>/dev/null || fail "copying failed: is the disk full?"
chmod 755 "$made"
remove
rm -rf "$target"
mv "$made" "$target"
echo "$target" > "$list"

put() { # SOURCE TARGET
    mkdir -p "$(dirname "$2")"
    sed "s|@edgespec@|\"$prefix/bin/edgespec\"|" "$1" > "$2"
    echo "$2" >> "$list"
}
ln -sfn "$target/edgespec" "$prefix/bin/edgespec"
echo "$prefix/bin/edgespec" >> "$list"
(cd "$target/share" && find man bash-completion zsh fish applications -type f) | while IFS= read -r path; do
    put "$target/share/$path" "$prefix/share/$path"
done
for unit in edgespec.service edgespec.socket; do put "$target/share/systemd/user/$unit" "$units/$unit"; done

echo "Installed: $prefix/bin/edgespec"
case :$PATH: in *":$prefix/bin:"*) ;; *) echo "Add $prefix/bin to PATH to call it by name." ;; esac
echo "To serve when a program connects: systemctl --user enable --now edgespec.socket"
