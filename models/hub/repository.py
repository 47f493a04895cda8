"""Models of Hub repositories: their names, and the records of those that were pulled.

A repository's files are in `OWNER--REPO` in the models folder. The record of a model, next to its files, pins
the commit and the SHA-256 of each file, so that a model is used without network and never changes by itself.
Records are read like any untrusted file: none names a file outside its folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from edgespec.core import EdgespecError
from edgespec.files import write_whole
from edgespec.models.hub.catalog import Entry, HubSource
from edgespec.text import printable

_PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_PATH = re.compile(rf"(?:{_PART}/){{0,3}}[A-Za-z0-9][A-Za-z0-9._-]{{0,150}}\.gguf")
_NAME = re.compile(
    rf"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?({_PART}/{_PART})/?(?::([\w./-]{{1,400}}))?"
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANT = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|BF16|F16|F32|MXFP4(?:_MOE)?))$", re.I
)
_RECORD = ".pin.json"


@dataclass(frozen=True, slots=True)
class RepositoryName:
    """`OWNER/REPO` of the Hub; `tag`: a quantization or a file, empty for the default."""

    repo: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo

    def folder(self, models: Path) -> Path:
        return models / self.repo.replace("/", "--")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A .gguf file: its path in the repository, its length and SHA-256."""

    path: str
    bytes: int
    sha256: str

    @property
    def local(self) -> str:
        """Its name in the repository's folder."""
        return self.path.replace("/", "--")


@dataclass(frozen=True, slots=True)
class RepositoryModel:
    """A model at a commit: one file, or the parts of a split one in order."""

    repo: str
    revision: str
    files: tuple[RepositoryFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def quantization(self) -> str:
        """The quantization in the file's name, in upper case; empty if there is none."""
        found = _QUANT.search(_stem(self.files[0].path))
        return found[1].upper() if found else ""

    @property
    def name(self) -> str:
        """The name that `pull` and `-m` take."""
        return f"{self.repo}:{self.quantization or self.files[0].path}"

    def entries(self, *, token: bool = False) -> list[Entry]:
        """Return the files in the form of catalog entries; `token`: sent with the request for the file."""
        return [
            Entry(
                name=f"{self.repo}:{file.path}", family=self.repo, role="chat", licence="", parameters=1,
                bytes=file.bytes, sha256=file.sha256, file=file.local, draft=None, starter=False, note="",
                sources=(HubSource(self.repo, file.path, self.revision, token),),
            )
            for file in self.files
        ]  # fmt: skip

    def path(self, models: Path) -> Path:
        """Return the path of the first file in the models folder `models`."""
        return RepositoryName(self.repo).folder(models) / self.files[0].local

    def record(self, models: Path) -> Path:
        """Return the path of the record in the models folder `models`."""
        path = self.path(models)
        return path.with_name(f".{path.name}{_RECORD}")


def parse_name(text: str) -> RepositoryName | None:
    """Return the repository and tag of `OWNER/REPO[:TAG]`, also after hf.co/ or https://huggingface.co/.

    None if `text` has another form, or could only be the path of a file.
    """
    match = _NAME.fullmatch(text)
    if match is None or match[1].endswith(".gguf") or "--" in match[1]:
        return None
    return RepositoryName(match[1], match[2] or "")


def group(repo: str, revision: str, files: Sequence[RepositoryFile]) -> list[RepositoryModel]:
    """Return the models in a listing: split files as one, without incomplete ones and unsafe names."""
    sets: dict[tuple[str, int], dict[int, RepositoryFile]] = {}
    for file in files:
        safe = _PATH.fullmatch(file.path) and re.fullmatch("[0-9a-f]{64}", file.sha256)
        if not safe or file.bytes < 4:
            continue
        part = _SPLIT.search(file.path.removesuffix(".gguf"))
        number, count = (int(part[1]), int(part[2])) if part else (1, 1)
        sets.setdefault((file.path if part is None else _stem(file.path, whole=True), count), {})[number] = (
            file
        )
    return [
        RepositoryModel(repo, revision, tuple(parts[n] for n in range(1, count + 1)))
        for (_, count), parts in sets.items()
        if sorted(parts) == list(range(1, count + 1))
    ]


def matching(models: Sequence[RepositoryModel], tag: str) -> list[RepositoryModel]:
    """Return the models that a tag names, by file or by quantization; all for an empty one."""
    if not tag:
        return list(models)
    wanted = tag.upper()
    by_file = [
        model
        for model in models
        for file in model.files[:1]
        if wanted in (file.path.upper(), PurePosixPath(file.path).name.upper(), file.local.upper())
    ]
    exact = by_file or [model for model in models if model.quantization == wanted]
    return exact or [model for model in models if model.quantization == f"UD-{wanted}"]


def pin(model: RepositoryModel, models: Path) -> None:
    """Write the record of a pulled model. Raises OSError."""
    write_whole(model.record(models), json.dumps(asdict(model), indent=1).encode())


def pinned(name: RepositoryName, models: Path) -> list[RepositoryModel]:
    """Return the pulled models that `name` means. Damaged records count as missing."""
    folder = name.folder(models)
    try:
        records = sorted(folder.glob(f".*{_RECORD}"))
    except OSError:
        return []
    found = [model for record in records if (model := _read(record)) and model.repo == name.repo]
    return matching(found, name.tag)


def all_pinned(models: Path) -> list[RepositoryModel]:
    """Return all pulled models in the models folder `models`, by name."""
    folders = [path.name for path in models.glob("*--*") if path.is_dir()]
    names = [parse_name(folder.replace("--", "/", 1)) for folder in sorted(folders)]
    return [model for name in names if name is not None for model in pinned(name, models)]


def _read(record: Path) -> RepositoryModel | None:
    try:
        if record.stat().st_size > 1 << 20:
            return None
        data = json.loads(record.read_bytes())
        files = [RepositoryFile(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in data["files"]]
        models = group(str(data["repo"]), str(data["revision"]), files)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return models[0] if len(models) == 1 and models[0].record(record.parent.parent) == record else None


def not_here(name: str) -> EdgespecError:
    return EdgespecError(f"{printable(name)} is not on this machine: run `edgespec pull {printable(name)}`")


def _stem(path: str, *, whole: bool = False) -> str:
    """Return the path, or its last part, without .gguf and the number of a part."""
    name = _SPLIT.sub("", path.removesuffix(".gguf"))
    return name if whole else PurePosixPath(name).name
