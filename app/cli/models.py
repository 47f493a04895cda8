"""`edgespec models`, `pull` and `rm`: list, verify, download and delete models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from edgespec.app.cli import quant
from edgespec.app.cli.fetching import fetch, fetch_repository
from edgespec.app.cli.options import JsonOption
from edgespec.app.console import table
from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import Entry, load_catalog
from edgespec.models.hub.elsewhere import other_models
from edgespec.models.hub.references import load_references
from edgespec.models.hub.repository import all_pinned
from edgespec.models.hub.store import Check, Installed, check, installed, models_folder, pulled, remove
from edgespec.text import printable

app = typer.Typer(help="List the catalog and the installed models.", invoke_without_command=True)


@app.callback()
def models(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="Also list the models of other programs on this machine.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the catalog and the installed models."""
    if context.invoked_subcommand is not None:
        return
    rows = [*_catalog(), *_references(), *_others(everything)]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    lines = [
        (
            printable(str(row["name"])), str(row.get("role", "")), _megabytes(row["bytes"]),
            str(row.get("licence", "")), str(row.get("draft") or row.get("drafter") or ""),
            "yes" if row["path"] else "no",
        )
        for row in rows
    ]  # fmt: skip
    print(table(("name", "role", "size", "license", "draft", "installed"), lines, right={2}))
    if not all(row["path"] for row in rows):
        print("\n`edgespec pull NAME` downloads a model")


def _catalog() -> Iterator[dict[str, Any]]:
    here = {one.entry.name: str(one.path) for one in installed() if one.entry is not None}
    for entry in load_catalog().values():
        yield {
            "name": entry.name, "family": entry.family, "role": entry.role, "licence": entry.licence,
            "parameters": entry.parameters, "bytes": entry.bytes, "draft": entry.draft,
            "path": here.get(entry.name),
        }  # fmt: skip


def _references() -> Iterator[dict[str, Any]]:
    folder = models_folder()
    for one in load_references().values():
        model = one.here(folder)
        yield {
            "name": one.name, "role": "chat", "licence": one.licence, "parameters": one.parameters,
            "bytes": model.bytes if model else one.bytes, "draft": one.draft or None,
            "drafter": one.drafter or None, "repository": str(one.repository),
            "revision": model.revision if model else None, "path": str(model.path(folder)) if model else None,
        }  # fmt: skip


def _others(everything: bool) -> Iterator[dict[str, Any]]:
    """The files of the models folder, and pulled models, that have no name of ours."""
    folder = models_folder()
    for file in installed():
        if file.entry is None:
            yield {"name": file.path.name, "bytes": file.bytes, "path": str(file.path)}
    named = {model.name for one in load_references().values() if (model := one.here(folder))}
    for model in all_pinned(folder):
        if model.name not in named:
            path = str(model.path(folder))
            yield {"name": model.name, "bytes": model.bytes, "revision": model.revision, "path": path}
    for other in other_models() if everything else ():
        yield {"name": other.name, "bytes": other.bytes, "path": str(other.path)}


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Catalog or file names.", show_default="all installed models")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the files of models against the catalog, or against the SHA256SUMS next to them."""
    checks = [check(one) for one in _chosen(names or [])]
    if as_json:
        print(json.dumps([one._asdict() | {"path": str(one.path)} for one in checks], indent=2))
    else:
        for one in checks:
            print(f"{one.state:<8} {printable(one.path)}")
    if damaged := [one for one in checks if one.state == "damaged"]:
        raise EdgespecError(_advice(damaged))


def _chosen(names: list[str]) -> list[Installed]:
    files = [*installed(), *pulled()]
    called = {name: one for one in files for name in _names(one)}
    if missing := [name for name in names if name not in called]:
        raise EdgespecError(f"{printable(missing[0])} is not installed: `edgespec models` lists the models")
    return [called[name] for name in names] or files


def _names(one: Installed) -> list[str]:
    return [one.path.name, *([one.entry.name] if one.entry is not None else [])]


def _advice(damaged: list[Check]) -> str:
    what = ", ".join(printable(one.path.name) for one in damaged)
    return f"damaged: {what}: download with `edgespec pull`, or unpack the program again"


def pull(
    names: Annotated[
        list[str],
        typer.Argument(help="Catalog names (see `edgespec models`), or OWNER/REPO[:QUANT] of the Hub."),
    ],
    offline: Annotated[bool, typer.Option(help="Never use the network.")] = False,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantise/--no-requantise",  # the published name
            help="Requantize draft models where that is faster on this machine.",
        ),
    ] = True,
) -> None:
    """Download models and verify them; later use needs no network."""
    entries: list[Entry] = []
    paths: list[Path] = []
    for name in names:
        if (entry := load_catalog().get(name)) is not None:
            entries.append(entry)
        paths.append(fetch(entry, offline) if entry is not None else fetch_repository(name, offline))
        print(paths[-1])
    if requantize:
        quant.make_missing_drafts(entries)
        quant.make_missing_heads(paths)


def rm(
    name: Annotated[
        str, typer.Argument(help="A catalog name, OWNER/REPO:QUANT, or a file in the models folder.")
    ],
) -> None:
    """Delete a model from this machine."""
    print(f"freed {_megabytes(remove(name))}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
