"""Print the differences between two builds and exit 1 if any: packaging/compare.py FOLDER FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from edgespec.models.hub.store import file_sha256


def described(folder: Path) -> dict[str, str]:
    """Return for each path its SHA-256, link target or "folder", and its mode."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        else:
            what = "folder" if path.is_dir() else file_sha256(path)
            what += f" {path.stat().st_mode:o}"
        found[str(path.relative_to(folder))] = what
    return found


def main() -> None:
    one, other = (described(Path(name)) for name in sys.argv[1:])
    different = sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))
    for path in different:
        print(f"{path}: {one.get(path, 'missing')} | {other.get(path, 'missing')}")
    print(f"{len(one)} and {len(other)} files, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
