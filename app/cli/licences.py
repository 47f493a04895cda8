"""`edgespec licences`: the components of Edgespec and their licenses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from edgespec.app.cli.options import JsonOption
from edgespec.app.console import table
from edgespec.core import EdgespecError
from edgespec.processes import program_folder
from edgespec.text import printable


class Component(NamedTuple):
    """One component; `text` is the full text of its license."""

    name: str
    version: str
    licence: str
    text: str


def licences(
    name: Annotated[
        str, typer.Argument(help="Print the full license of this component.", show_default=False)
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List the components of Edgespec with their licenses."""
    found = components()
    if name:
        texts = [one.text for one in found if one.name.lower() == name.lower()]
        if not texts:
            raise EdgespecError(f"unknown component {printable(name)}: `edgespec licences` lists them")
        print(texts[0].rstrip())
        return
    if as_json:
        print(
            json.dumps([{"name": one.name, "version": one.version, "licence": one.licence} for one in found])
        )
        return
    rows = [(one.name, one.version, one.licence) for one in found]
    print(table(("component", "version", "license"), rows, right=()))


def components() -> list[Component]:
    """The components of a frozen program, as listed by its build; else the installed packages in use."""
    program = program_folder()
    return _installed() if program is None else _bundled(program)


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
            f"cannot read sbom.cdx.json next to the program ({printable(error)}): unpack the program again"
        ) from None


def _installed() -> list[Component]:
    """Edgespec's package and its dependencies, direct and indirect."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    found: dict[str, Component] = {}
    queue = ["edgespec"]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system, or of an extra
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
