"""Which models are on this machine, and whether they are what they should be.

The store is a folder of .gguf files and of folders with ONNX models, and beside a program that came with
models a second one, looked at first; nothing is pulled into it. A file that goes by a catalogue name is never
handed out before its SHA-256 was compared. Hashing a gigabyte at every start would cost seconds, so a hidden
record beside the file says which state of it was found good; it guards against damage, not against someone
who may write in the folder. Knows nothing of networks: see `download`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from edgespec.core import EdgespecError
from edgespec.machine.paths import expanded, user_folder
from edgespec.models.hub.catalog import Entry, load_catalog
from edgespec.processes import program_folder
from edgespec.text import printable

MANIFEST = "SHA256SUMS"
"""The file beside models that says what they should be: `sha256sum`'s format."""


class Installed(NamedTuple):
    """A .gguf file or ONNX folder in a models folder, `bytes` long; `entry` is None if it is not known."""

    entry: Entry | None
    path: Path
    bytes: int


def models_folder() -> Path:
    """EDGESPEC_MODELS, or `edgespec/models` in the user's data folder. May not exist yet."""
    return user_folder("data", "EDGESPEC_MODELS", "models")


def bundled_folder() -> Path | None:
    """`models` beside the executable of a frozen program; None if it came without."""
    program = program_folder()
    folder = program and program / "models"
    return folder if folder and (folder / MANIFEST).is_file() else None


def model_folders() -> list[Path]:
    """Where models are looked for, the first first."""
    return [folder for folder in (bundled_folder(), models_folder()) if folder is not None]


def resolve(name_or_path: str) -> Path:
    """The .gguf file or ONNX folder meant by a catalogue name, a path, or a name in a models folder.

    A file that stands for a catalogue entry has been verified, now (seconds) or earlier. Raises EdgespecError
    for one that is damaged or not on this machine, and for a name or path that does not exist.
    """
    folders, path = model_folders(), expanded(name_or_path)
    if named := load_catalog().get(name_or_path):
        return _good(named, folders)
    if not _exists(path):  # a file where the user stands comes first
        inside = [folder / path for folder in folders if _is_in(folder / path, folder)]
        path = next(filter(_exists, inside), inside[-1] if inside else path)
    for folder in folders:
        if entry := _entry_of(path, folder):
            return _good(entry, [folder])
    if not name_or_path or not _exists(path):
        raise _unknown(name_or_path)
    return path


def _good(entry: Entry, folders: list[Path]) -> Path:
    """The entry's file in the first folder where it is good. Raises EdgespecError if there is none."""
    damage = EdgespecError(f"{entry.name} is not on this machine: run `edgespec pull {entry.name}`")
    for folder in folders:
        try:
            if path := verified(entry, folder):
                return path
        except EdgespecError as error:
            damage = error
    raise damage


def verified(entry: Entry, folder: Path) -> Path | None:
    """The entry's file in `folder` if it is there and good, None if it is not there.

    Reads the whole file (about a second a gigabyte) unless it is as it was when last found good. Raises
    EdgespecError if it is damaged or cannot be read.
    """
    path = folder / entry.file
    try:
        state = _state(entry, path)
        with suppress(OSError):
            if _record(path).read_bytes() == state:
                return path
        good = path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EdgespecError(f"cannot read {printable(path)}: {error.strerror}") from None
    if not good:
        raise EdgespecError(
            f"{printable(path)} is damaged, its SHA-256 is not the catalogue's: "
            f"run `edgespec pull {entry.name}` to fetch it again"
        )
    with suppress(OSError):  # a folder that is only readable is fine, just slower
        _record(path).write_bytes(state)
    return path


def record_verified(entry: Entry, path: Path) -> None:
    """Note that the file at `path` has just been compared with the entry's SHA-256 and is good."""
    with suppress(OSError):
        _record(path).write_bytes(_state(entry, path))


class Check(NamedTuple):
    """What `check` found of a file: "good", "damaged", or "unknown" where nothing says what it should be."""

    path: Path
    state: Literal["good", "damaged", "unknown"]


def check(one: Installed) -> Check:
    """Read the whole file and compare it with the catalogue's SHA-256, or its folder's manifest's.

    Raises EdgespecError if it cannot be read.
    """
    wanted = one.entry.sha256 if one.entry is not None else manifest(one.path.parent).get(one.path.name)
    if wanted is None:
        return Check(one.path, "unknown")
    try:
        return Check(one.path, "good" if file_sha256(one.path) == wanted else "damaged")
    except OSError as error:
        raise EdgespecError(f"cannot read {printable(one.path)}: {error.strerror}") from None


def manifest(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as the folder's manifest has it; empty without one."""
    try:
        lines = (folder / MANIFEST).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found = (re.fullmatch(r"([0-9a-f]{64}) [ *]([^/]+)", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_onnx(path: Path) -> bool:
    """Does `path` look like a folder with an ONNX model? Never raises."""
    try:
        return path.is_dir() and any(path.glob("*.onnx"))
    except (OSError, ValueError):
        return False


def file_sample(path: Path) -> str:
    """A digest of 64 places of a file: two fine-tunings of a model differ in all of them. Raises OSError."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(4096))
    return digest.hexdigest()


def installed() -> list[Installed]:
    """What is in the models folders: catalogue entries in their order, then others by name.

    Those are .gguf files and folders with an ONNX model.

    Says what is there, not whether it is good: nothing is hashed. Of a name in both folders, the first.
    """
    with suppress(OSError):
        found = [path for folder in reversed(model_folders()) for path in folder.glob("*")]
        found.sort(key=lambda path: path.name)
        files = {path.name: path for path in found if path.suffix == ".gguf" and path.is_file()}
        known = [(entry, files.pop(entry.file)) for entry in load_catalog().values() if entry.file in files]
        onnx = {path.name: path for path in found if path.name[0] != "." and is_onnx(path)}
        everything = [*known, *((None, path) for path in [*files.values(), *onnx.values()])]
        return [Installed(entry, path, _size(path)) for entry, path in everything]
    return []


def remove(name: str) -> int:
    """Delete a model and what an interrupted pull left of it; the bytes freed.

    `name` is a catalogue name, or a .gguf file or ONNX folder directly in the models folder. Raises
    EdgespecError for anything else, for a model that is not there, and while it is being pulled.
    """
    folder = models_folder()
    path = folder / expanded(name)
    entry = load_catalog().get(name) or _entry_of(path, folder)
    if entry is None:
        if not (_is_in(path, folder) and _exists(path) and (path.is_file() or is_onnx(path))):
            raise EdgespecError(
                f"{printable(name)} is not a model in {printable(folder)}: `edgespec models` lists them"
            )
        return _delete([path])
    if not folder.is_dir():
        raise EdgespecError(f"{entry.name} is not on this machine")
    with pull_lock(entry, folder):
        path = folder / entry.file
        freed = _delete([path, _record(path), partial_folder(entry, folder)])
    if not freed:
        raise EdgespecError(f"{entry.name} is not on this machine")
    return freed


def partial_folder(entry: Entry, folder: Path) -> Path:
    """Where a pull keeps what it has so far."""
    return folder / f"{entry.name}.partial"


def pull_lock(entry: Entry, folder: Path) -> AbstractContextManager[object]:
    """Held by whoever writes or deletes the entry's files. Raises EdgespecError if another process does."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(folder / f".{entry.name}.lock").acquire(blocking=False)
    except Timeout:
        raise EdgespecError(
            f"another process is fetching {entry.name}: wait for it to finish, or stop it first"
        ) from None
    except OSError as error:
        raise EdgespecError(f"cannot write in {printable(folder)}: {error.strerror}") from None


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _state(entry: Entry, path: Path) -> bytes:
    """What must be as it was for a record to hold. Unlike mtime, ctime cannot be set back by a program."""
    s = path.stat()
    return f"{entry.sha256} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}\n".encode()


def _record(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder that may not be searched
        return False


def _is_in(path: Path, folder: Path) -> bool:
    """Is `path` directly in `folder`? Only the way there is resolved: the file itself may be a link."""
    try:
        return (path.suffix == ".gguf" or is_onnx(path)) and path.parent.resolve() == folder.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL in the name
        return False


def _entry_of(path: Path, folder: Path) -> Entry | None:
    if not _is_in(path, folder):
        return None
    return next((entry for entry in load_catalog().values() if entry.file == path.name), None)


def _unknown(name: str) -> EdgespecError:
    if name.endswith(".gguf") or "/" in name or os.sep in name:
        return EdgespecError(f"there is no file {printable(name)}, or it may not be read: check the path")
    from difflib import get_close_matches

    close = get_close_matches(name[:100], load_catalog(), n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(close)}" if close else f"known are {', '.join(load_catalog())}"
    return EdgespecError(
        f"no model is called {printable(name)}: {known}; "
        "a path to a .gguf file or to the folder of an ONNX model works too"
    )


def _delete(paths: list[Path]) -> int:
    freed = 0
    try:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                freed += sum(p.lstat().st_size for p in path.rglob("*") if p.is_file())
                shutil.rmtree(path)
            elif path.exists() or path.is_symlink():
                freed += path.lstat().st_size
                path.unlink()
    except OSError as error:
        raise EdgespecError(f"cannot delete {printable(path)}: {error.strerror}") from None
    return freed
