"""The models on this machine, and their verification.

The store is a folder of .gguf files and of folders with ONNX models. A program bundled with models has a
second one next to it, which is searched first and never written. The file of a catalog entry is used only
after its SHA-256 was verified. Hashing a gigabyte takes seconds, so a hidden record next to the file
contains the state that was verified; it detects damage, not an attacker who may write in the folder.
Downloads: see `download`.
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
from edgespec.models.hub.elsewhere import other_model
from edgespec.models.hub.references import load_references
from edgespec.models.hub.repository import (
    RepositoryModel,
    RepositoryName,
    all_pinned,
    not_here,
    parse_name,
    pinned,
)
from edgespec.processes import program_folder
from edgespec.text import printable

MANIFEST = "SHA256SUMS"
"""The file with the SHA-256 of the models in a folder, in `sha256sum`'s format."""


class Installed(NamedTuple):
    """A .gguf file or ONNX folder in a models folder, `bytes` long; `entry`: None if not in the catalog."""

    entry: Entry | None
    path: Path
    bytes: int


def models_folder() -> Path:
    """Return EDGESPEC_MODELS, or `edgespec/models` in the user's data folder. May not exist yet."""
    return user_folder("data", "EDGESPEC_MODELS", "models")


def bundled_folder() -> Path | None:
    """Return `models` next to the executable of a frozen program, None if there is none."""
    program = program_folder()
    folder = program and program / "models"
    return folder if folder and (folder / MANIFEST).is_file() else None


def model_folders() -> list[Path]:
    """Return the folders to search for models, in order."""
    return [folder for folder in (bundled_folder(), models_folder()) if folder is not None]


def resolve(name_or_path: str) -> Path:
    """Return the .gguf file or ONNX folder for a catalog name, a path, or a name in a models folder.

    `OWNER/REPO[:TAG]` means a pulled model of the Hub, in parts its first part; no network is used. The
    files of those and of catalog entries have been verified, now (seconds) or earlier. `PROGRAM:NAME` is a
    model of another program (see `elsewhere`). Raises EdgespecError if one is damaged or not on this machine,
    and for a name or path that does not exist.
    """
    folders, path = model_folders(), expanded(name_or_path)
    if named := load_catalog().get(name_or_path):
        return _good(named, folders)
    if reference := load_references().get(name_or_path):
        return _pulled(reference.repository, reference.name)
    if not _exists(path):  # a file in the current folder comes first
        inside = [folder / path for folder in folders if _is_in(folder / path, folder)]
        path = next(filter(_exists, inside), inside[-1] if inside else path)
    for folder in folders:
        if entry := _entry_of(path, folder):
            return _good(entry, [folder])
    if name_or_path and _exists(path):
        return path
    if repository := parse_name(name_or_path):
        return _pulled(repository, str(repository))
    if other := other_model(name_or_path):
        return other.path
    raise _unknown(name_or_path)


def _pulled(name: RepositoryName, shown: str) -> Path:
    """Return the first file of the pulled model, the largest of several, after all were verified."""
    models = pinned(name, models_folder())
    if not models:
        raise not_here(shown)
    return verified_parts(max(models, key=lambda model: model.bytes), name)


def verified_parts(model: RepositoryModel, name: RepositoryName) -> Path:
    """Return the first file of a pulled model. Raises EdgespecError if a part is missing or damaged."""
    folder = name.folder(models_folder())
    for entry in model.entries():
        if verified(entry, folder) is None:
            raise EdgespecError(
                f"{printable(entry.file)} is missing in {printable(folder)}: "
                f"run `edgespec pull {printable(str(name))}` to fetch it again"
            )
    return folder / model.files[0].local


def _good(entry: Entry, folders: list[Path]) -> Path:
    """Return the entry's file in the first folder where it is good. Raises EdgespecError if none is."""
    damage = EdgespecError(f"{entry.name} is not on this machine: run `edgespec pull {entry.name}`")
    for folder in folders:
        try:
            if path := verified(entry, folder):
                return path
        except EdgespecError as error:
            damage = error
    raise damage


def verified(entry: Entry, folder: Path) -> Path | None:
    """Return the entry's verified file in `folder`, None if it does not exist.

    Reads the whole file (about a second per gigabyte) unless it is unchanged since it was last verified.
    Raises EdgespecError if it is damaged or cannot be read.
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
            f"{printable(path)} is damaged, its SHA-256 differs from the catalog's: "
            f"run `edgespec pull {entry.name}` to fetch it again"
        )
    with suppress(OSError):  # a read-only folder works, just slower
        _record(path).write_bytes(state)
    return path


def record_verified(entry: Entry, path: Path) -> None:
    """Record that the file at `path` has been verified against the entry's SHA-256."""
    with suppress(OSError):
        _record(path).write_bytes(_state(entry, path))


class Check(NamedTuple):
    """The result of `check` for a file: "good", "damaged", or "unknown" if no SHA-256 is known."""

    path: Path
    state: Literal["good", "damaged", "unknown"]


def check(one: Installed) -> Check:
    """Read the whole file and compare it with the SHA-256 in the catalog, or in the folder's manifest.

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
    """Return SHA-256 by file name from the folder's manifest; empty without one."""
    try:
        lines = (folder / MANIFEST).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found = (re.fullmatch(r"([0-9a-f]{64}) [ *]([^/]+)", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def file_sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_onnx(path: Path) -> bool:
    """Whether `path` is a folder with an .onnx file. Never raises."""
    try:
        return path.is_dir() and any(path.glob("*.onnx"))
    except (OSError, ValueError):
        return False


def file_sample(path: Path) -> str:
    """Return a digest of 64 samples of a file: fine-tunings of a model differ in all. Raises OSError."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(4096))
    return digest.hexdigest()


def pulled() -> list[Installed]:
    """Return the files of pulled Hub models, a split model as its parts, by name. Nothing is verified."""
    folder = models_folder()
    return [
        Installed(entry, path, _size(path))
        for model in all_pinned(folder)
        for entry in model.entries()
        if (path := RepositoryName(model.repo).folder(folder) / entry.file).is_file()
    ]


def installed() -> list[Installed]:
    """Return the models in the models folders: catalog entries in their order, then others by name.

    Others are .gguf files and folders with an ONNX model. Nothing is verified. If both folders have a name,
    the first counts.
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
    """Delete a model and the data of an interrupted pull, and return the bytes freed.

    `name`: a catalog name, a pulled `OWNER/REPO[:TAG]`, or a .gguf file or ONNX folder directly in the models
    folder. Raises EdgespecError for anything else, for a missing model, and while it is being pulled.
    """
    folder = models_folder()
    path = folder / expanded(name)
    reference = load_references().get(name)
    repository = reference.repository if reference is not None else parse_name(name)
    if repository is not None and not _exists(path):
        return _remove_pulled(repository)
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


def _remove_pulled(name: RepositoryName) -> int:
    models = pinned(name, models_folder())
    if len(models) != 1:
        several = ", ".join(model.name for model in models)
        raise EdgespecError(f"several models: choose one of {several}") if models else not_here(str(name))
    folder, freed = name.folder(models_folder()), 0
    for entry in models[0].entries():
        with pull_lock(entry, folder):
            path = folder / entry.file
            freed += _delete([path, _record(path), partial_folder(entry, folder)])
    return freed + _delete([models[0].record(models_folder())])


def partial_folder(entry: Entry, folder: Path) -> Path:
    """Return the folder for the data of an incomplete pull."""
    return folder / f"{_plain(entry.name)}.partial"


def pull_lock(entry: Entry, folder: Path) -> AbstractContextManager[object]:
    """Lock the entry's files. Raises EdgespecError if another process has the lock."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(folder / f".{_plain(entry.name)}.lock").acquire(blocking=False)
    except Timeout:
        raise EdgespecError(
            f"another process is fetching {entry.name}: wait for it to finish, or stop it first"
        ) from None
    except OSError as error:
        raise EdgespecError(f"cannot write in {printable(folder)}: {error.strerror}") from None


def _size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _state(entry: Entry, path: Path) -> bytes:
    """Return the state that a record is valid for. Unlike mtime, a program cannot set ctime."""
    s = path.stat()
    return f"{entry.sha256} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}\n".encode()


def _plain(name: str) -> str:
    """Return the name of a model as part of a file name."""
    return re.sub("[/:]", "-", name)


def _record(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder without permission
        return False


def _is_in(path: Path, folder: Path) -> bool:
    """Whether `path` is directly in `folder`. Only the parent is resolved: the file may be a link."""
    try:
        return (path.suffix == ".gguf" or is_onnx(path)) and path.parent.resolve() == folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL in the name
        return False


def _entry_of(path: Path, folder: Path) -> Entry | None:
    if not _is_in(path, folder):
        return None
    return next((entry for entry in load_catalog().values() if entry.file == path.name), None)


def _unknown(name: str) -> EdgespecError:
    if name.endswith(".gguf") or "/" in name or os.sep in name:
        return EdgespecError(f"no file {printable(name)}, or no permission to read it: check the path")
    from difflib import get_close_matches

    names = [*load_catalog(), *load_references()]
    close = get_close_matches(name[:100], names, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(close)}" if close else f"valid names are {', '.join(load_catalog())}"
    return EdgespecError(
        f"unknown model {printable(name)}: {known}; "
        "paths of .gguf files and of folders with an ONNX model are valid too"
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
