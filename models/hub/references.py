"""The models known by name whose SHA-256 is taken from the Hub at the first pull: `references.toml`.

The record of the pull pins it, with the commit (see `repository`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from edgespec.core import EdgespecError
from edgespec.models.hub.repository import RepositoryModel, RepositoryName, parse_name, pinned


@dataclass(frozen=True, slots=True)
class Reference:
    """A model of the Hub by a short name.

    `bytes` is about the size of its file; `drafter`: what ships with it and drafts for it, empty if nothing;
    `draft`: the name of a draft model, empty if there is none.
    """

    name: str
    repository: RepositoryName
    licence: str
    parameters: int
    bytes: int
    drafter: str = ""
    draft: str = ""

    def here(self, models: Path) -> RepositoryModel | None:
        """Return the pulled model in the models folder `models`, None if it was not pulled."""
        return next(iter(pinned(self.repository, models)), None)


@cache
def load_references() -> Mapping[str, Reference]:
    """Return the references by name, in the order of the file. Raises EdgespecError if it is invalid."""
    text = resources.files(__package__).joinpath("references.toml").read_text("utf-8")
    return MappingProxyType({name: _reference(name, table) for name, table in tomllib.loads(text).items()})


def _reference(name: str, table: dict[str, object]) -> Reference:
    repository = parse_name(str(table.pop("repository")))
    try:
        if repository is None:
            raise TypeError
        return Reference(name, repository, **table)  # type: ignore[arg-type]
    except TypeError:
        raise EdgespecError(f"catalog entry {name} is not valid: see references.toml") from None
