"""`edgespec licences`: what Edgespec is made of, and under which terms."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from edgespec.core import EdgespecError
from edgespec.text import printable


class Component(NamedTuple):
    """One component; `text` is its licence in full."""

    name: str
    version: str
    licence: str
    text: str


def licences(
    name: Annotated[str, typer.Argument(help="Print this one's licence in full.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what Edgespec is made of with its licences."""
    found = components()
    if name:
        texts = [one.text for one in found if one.name.lower() == name.lower()]
        if not texts:
            raise EdgespecError(f"there is no component {printable(name)}: `edgespec licences` lists them.")
        print(texts[0].rstrip())
        return
    if as_json:
        print(
            json.dumps([{"name": one.name, "version": one.version, "licence": one.licence} for one in found])
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("component", "version", "licence", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.name, one.version, one.licence)
    Console(markup=False, highlight=False).print(table)


def components() -> list[Component]:
    """All that is in the frozen program, as its build wrote it down; else the installed packages in use."""
    if getattr(sys, "frozen", False):
        return _bundled(Path(sys.executable).resolve().parent)
    return _installed()


def _bundled(program: Path) -> list[Component]:
    try:
        listed = json.loads((program / "sbom.cdx.json").read_text("utf-8"))["components"]
        return [
            Component(
                one["name"],
                one["version"],
                next(iter(one["licenses"][0]["license"].values())),
                (program / "licences" / f"{one['name']}.txt").read_text("utf-8"),
            )
            for one in listed
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EdgespecError(
            f"the list of components beside the program cannot be read ({printable(error)}): unpack it again."
        ) from None


def _installed() -> list[Component]:
    """Edgespec's package and what it needs, directly or not."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    found: dict[str, Component] = {}
    queue = ["edgespec"]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system, or an extra
            continue
        data = package.metadata.json
        expression, short = (str(data.get(key, "")) for key in ("license_expression", "license"))
        licence = expression or ("" if "\n" in short else short) or "see its text"
        texts = [
            path.read_text("utf-8")
            for path in package.files or []
            if ".dist-info/" in str(path) and path.name.upper().startswith(("LICEN", "COPYING", "NOTICE"))
        ]
        found[name] = Component(str(data["name"]), package.version, licence, "\n\n".join(texts) or licence)
        queue += [_name_of(one) for one in package.requires or [] if "extra ==" not in one]
    return sorted(found.values(), key=lambda one: one.name.lower())


def _name_of(requirement: str) -> str:
    """`numpy` of `numpy>=2.0; python_version > "3"`."""
    return "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
