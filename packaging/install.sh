#!/bin/sh
# Installs the unpacked program for one user, without root: ./install.sh [--prefix FOLDER] [--uninstall]
#   FOLDER/lib/edgespec-VERSION-PLATFORM   the program, and the models that came with it
#   FOLDER/bin/edgespec                    a link to it; FOLDER/share: manual page, completions, desktop entry
# and user units for systemd. The default FOLDER is ~/.local. Files written by the program (conversations,
# models, settings) are never changed.
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
    *) fail "unknown option $1 (valid: --prefix FOLDER, --uninstall)" ;;
    esac
    shift
done
case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
# The units and the desktop entry contain it, each with its own quoting rules.
case $prefix in *[!A-Za-z0-9/._\ +-]*) fail "invalid --prefix: choose a folder of plain letters, digits and . _ + -" ;; esac
list=$prefix/lib/edgespec-files

# Delete the files that an earlier run listed, if they are in folders that this script writes to.
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
    [ -f "$list" ] || fail "Edgespec is not installed in $prefix: pass the --prefix of the installation"
    systemctl --user disable --now edgespec.socket edgespec.service >/dev/null 2>&1 || true
    remove
    echo "removed from $prefix; models, conversations and settings are kept"
    exit
fi

[ -x "$here/edgespec" ] && [ -d "$here/_internal" ] || fail "no program next to this script: run it in the unpacked folder"
version=$("$here/edgespec" --version) || fail "the program does not run on this system: install from source"
target=$prefix/lib/edgespec-${version#edgespec }-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
[ "$here" != "$target" ] || fail "this is the installed copy: run the script in the unpacked folder, or with --uninstall"
mkdir -p "$prefix/lib" "$prefix/bin" 2>/dev/null || fail "cannot write in $prefix: choose another --prefix"
made=$(mktemp -d "$prefix/lib/.edgespec-XXXXXX") || fail "cannot write in $prefix: choose another --prefix"
trap 'rm -rf "$made"' EXIT
cp -R "$here/." "$made/" 2>/dev/null || fail "copying failed: check that the disk is not full"
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

echo "installed: $prefix/bin/edgespec"
case :$PATH: in *":$prefix/bin:"*) ;; *) echo "add $prefix/bin to PATH to run it by name" ;; esac
echo "to serve when a client connects: systemctl --user enable --now edgespec.socket"
