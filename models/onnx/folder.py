"""The files of an ONNX model's folder, and the configuration in its JSON files.

Only regular files directly in the folder are opened, up to a maximum size.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from edgespec.core import EdgespecError
from edgespec.text import printable

GENAI, CONFIG, TOKENIZER = "genai_config.json", "config.json", "tokenizer.json"
GENERATION = "generation_config.json"
AGAIN = "export or download the model again"

_MAX_JSON = {TOKENIZER: 128 << 20}
_MAX_CONFIG = 16 << 20


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Read a JSON object, None if there is no such file. Raises EdgespecError if it is invalid."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        value = json.loads(read_bytes(folder, name))
    except (ValueError, RecursionError):
        raise EdgespecError(f"{shown_name(folder)}/{name} is not valid JSON: {AGAIN}") from None
    if not isinstance(value, dict):
        raise EdgespecError(f"{shown_name(folder)}/{name} is not a JSON object: {AGAIN}")
    return value


def read_text(folder: Path, name: str) -> str | None:
    """Read a text file, None if there is no such file."""
    if not os.path.lexists(folder / name):
        return None
    return read_bytes(folder, name).decode("utf-8", "replace")


def regular_file(folder: Path, name: str, what: str, alone: bool = False) -> os.stat_result:
    """Return the status of a regular file directly in `folder`; `alone`: without other hard links."""
    shown = f"{shown_name(folder)}/{printable(name)}"
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise EdgespecError(
            f"{shown_name(folder)} names {printable(name)} as {what}: it must be in the folder"
        )
    try:
        status = (folder / name).lstat()
    except OSError as error:
        raise EdgespecError(f"cannot read {shown}, {what} ({error.strerror}): {AGAIN}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise EdgespecError(f"{shown} is {kind}: copy {what} itself into the folder")
    if alone and status.st_nlink > 1:
        raise EdgespecError(f"{shown} has another name elsewhere (a hard link): copy {what} instead")
    return status


def read_bytes(folder: Path, name: str) -> bytes:
    """Read a file. Raises EdgespecError."""
    most = _MAX_JSON.get(name, _MAX_CONFIG)
    if regular_file(folder, name, "a part of the model").st_size > most:
        raise EdgespecError(f"{shown_name(folder)}/{name} is larger than {most >> 20} MiB: {AGAIN}")
    try:
        return (folder / name).read_bytes()[: most + 1]
    except OSError as error:
        raise EdgespecError(f"cannot read {shown_name(folder)}/{name}: {error.strerror}") from None


class FolderConfig:
    """The configuration in the JSON files of either layout, by the same names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        genai, plain = read_json(folder, GENAI), read_json(folder, CONFIG)
        if genai is None and plain is None:
            raise EdgespecError(
                f"{shown_name(folder)} has neither {GENAI} nor {CONFIG}: choose the folder of an ONNX model"
            )
        self._model = _mapping((genai or {}).get("model"))
        self._decoder = _mapping(self._model.get("decoder"))
        self._plain = plain or {}
        self._generation = read_json(folder, GENERATION) or {}

    def model_file(self) -> str:
        name = self._decoder.get("filename")
        if isinstance(name, str):
            return name
        found = sorted(path.name for path in self._folder.glob("*.onnx"))
        if "model.onnx" in found:
            return "model.onnx"
        if len(found) != 1:
            raise EdgespecError(f"{shown_name(self._folder)} has no model.onnx: {AGAIN}")
        return found[0]

    @property
    def architecture(self) -> str:
        kind = self._model.get("type") or self._plain.get("model_type")
        return kind if isinstance(kind, str) else "unknown"

    def number(self, genai: str, plain: str) -> int:
        """Return a positive integer, 0 if there is none."""
        for value in (self._decoder.get(genai), self._model.get(genai), self._plain.get(plain)):
            if type(value) is int and value > 0:
                return value
        return 0

    @property
    def head_size(self) -> int:
        heads = self.number("num_attention_heads", "num_attention_heads")
        return self.number("head_size", "head_dim") or (
            self.number("hidden_size", "hidden_size") // heads if heads else 0
        )

    def ids(self, name: str) -> tuple[int, ...]:
        """Return token ids, a number or a list in the files, merged from all files."""
        found: list[int] = []
        for place in (self._model, self._generation, self._plain):
            value = place.get(name)
            found += [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
        return tuple(dict.fromkeys(found))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def shown_name(folder: Path) -> str:
    """Return the folder's own name, safe to print."""
    return printable(folder.name or folder)
