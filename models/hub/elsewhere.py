"""Models that other programs downloaded, used in place. Their folders are only read.

Ollama, LM Studio, llama.cpp, GPT4All, Jan and the Hugging Face cache; where each keeps its files is from
their documentation. Names and manifests are read like any untrusted file, and `check_gguf` checks a model
before it is loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgespec.machine.paths import expanded
from edgespec.models.split import part_paths

_DEPTH, _MOST = 8, 10_000  # folders below each other, and entries read, in one program's folder
_MANIFEST_BYTES = 1 << 20
_NOT_MODELS = re.compile(r"(^|[-_.])(mmproj|imatrix)([-_.]|$)", re.I)
_OLLAMA_LAYER = "application/vnd.ollama.image."


@dataclass(frozen=True, slots=True)
class OtherModel:
    """A .gguf file of another program. `name` is PROGRAM:NAME, with the program's own name for it."""

    name: str
    path: Path
    bytes: int


def other_models() -> list[OtherModel]:
    """Return the models of other programs on this machine, by name. Unreadable folders count as empty."""
    found = [one for program, folders in _folders().items() for one in _models(program, folders)]
    return sorted({one.name: one for one in found}.values(), key=lambda one: one.name)


def other_model(name: str) -> OtherModel | None:
    """Return the model with this name, None if there is none."""
    program = name.partition(":")[0]
    if program not in _PROGRAMS:
        return None
    return next((one for one in _models(program, _folders()[program]) if one.name == name), None)


def belongs_to_other(path: Path) -> bool:
    """Whether `path` is in the folder of another program."""
    return any(folder in path.absolute().parents for folders in _folders().values() for folder in folders)


_PROGRAMS = ("ollama", "lmstudio", "llama.cpp", "gpt4all", "jan", "huggingface")


def _folders() -> dict[str, list[Path]]:
    """Return the folders to read by program, with what the environment and pointer files name first."""
    import platformdirs  # slow, and needed for these names alone

    home = Path.home()
    data = platformdirs.user_data_path(appauthor=False, roaming=False).absolute()
    cache = platformdirs.user_cache_path(appauthor=False).absolute()
    studio = _pointer(home / ".lmstudio-home-pointer") or home / ".lmstudio"
    hub = _named("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or (
        (_named("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
        / "hub"
    )
    ollama = [home / ".ollama/models", Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama")]
    named = _named("OLLAMA_MODELS")
    return {
        "ollama": [named] if named else ollama,
        "lmstudio": [studio / "models", home / ".cache/lm-studio/models"],
        "llama.cpp": [_named("LLAMA_CACHE") or cache / "llama.cpp"],
        "gpt4all": [data / "nomic.ai/GPT4All"],
        "jan": [data / "Jan/data/llamacpp/models", home / "jan/models"],
        "huggingface": [hub],
    }


def _named(*variables: str) -> Path | None:
    values = [os.environ.get(variable, "") for variable in variables]
    return next((expanded(value).absolute() for value in values if value), None)


def _pointer(path: Path) -> Path | None:
    """Return the folder that LM Studio's pointer file names, None if it is missing or not a path."""
    with suppress(OSError, ValueError):
        with path.open(encoding="utf-8") as file:
            text = file.read(4096).strip()
        if text and Path(text).is_absolute():
            return Path(text)
    return None


def _models(program: str, folders: list[Path]) -> Iterator[OtherModel]:
    for folder in folders:
        yield from _ollama(folder) if program == "ollama" else _files(program, folder)


def _files(program: str, folder: Path) -> Iterator[OtherModel]:
    """Yield the .gguf files in the folder of a program; a split model as its first part."""
    for path in _walk(folder):
        parts = part_paths(path)
        if path.suffix != ".gguf" or _NOT_MODELS.search(path.stem) or (parts and parts[0] != path):
            continue
        with suppress(OSError):
            size = sum(part.stat().st_size for part in parts or (path,))
            yield OtherModel(f"{program}:{_label(program, path.relative_to(folder))}", path, size)


def _label(program: str, path: Path) -> str:
    """Return the name that a program shows for a file, given below its folder."""
    parts = path.parts
    if program == "huggingface" and len(parts) > 3 and parts[0].startswith("models--"):
        return "/".join([*parts[0].removeprefix("models--").split("--", 1), *parts[3:]])
    if program == "jan" and path.name == "model.gguf":
        return path.parent.as_posix()
    return path.as_posix()


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below `folder`, within bounds. Links to folders are not followed."""
    left = _MOST
    for here, folders, names in os.walk(folder):
        if len(Path(here).relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        folders.sort()
        for name in sorted(names):
            left -= 1
            if left < 0:
                return
            yield Path(here, name)


def _ollama(folder: Path) -> Iterator[OtherModel]:
    """Yield Ollama's models. A manifest has the digest of the model's file, which is named after it."""
    for path in _walk(folder / "manifests"):
        parts = path.relative_to(folder / "manifests").parts
        blob = _model_layer(path)
        if blob is None or len(parts) < 3:
            continue
        host, *middle, model, tag = parts
        shown = [part for part in middle if part != "library"]
        prefix = [] if host == "registry.ollama.ai" else [host]
        for file in (folder / "blobs" / f"sha256-{blob}", folder / "blobs" / f"sha256:{blob}"):
            with suppress(OSError):
                name = f"ollama:{'/'.join([*prefix, *shown, model])}:{tag}"
                yield OtherModel(name, file, file.stat().st_size)
                break


def _model_layer(manifest: Path) -> str | None:
    """Return the SHA-256 in the manifest of a model of one file without an adapter, None for any other."""
    try:
        if manifest.stat().st_size > _MANIFEST_BYTES:
            return None
        layers = json.loads(manifest.read_bytes())["layers"]
        kinds = [str(layer["mediaType"]).removeprefix(_OLLAMA_LAYER) for layer in layers]
        digests = [str(layer["digest"]) for layer in layers]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if kinds.count("model") != 1 or "adapter" in kinds:
        return None
    match = re.fullmatch("sha256:([0-9a-f]{64})", digests[kinds.index("model")])
    return match[1] if match else None
