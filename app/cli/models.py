"""`edgespec models`, `pull` and `rm`: what there is, what is here, and whether it is undamaged."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from edgespec.app.cli import quant
from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import Entry, load_catalog
from edgespec.models.hub.store import Check, Installed, check, installed, models_folder, remove
from edgespec.text import printable

app = typer.Typer(help="List the catalogue and what is on this machine.", invoke_without_command=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the catalogue and what is on this machine."""
    if context.invoked_subcommand is not None:
        return
    files = installed()
    here = {one.entry.name: one for one in files if one.entry is not None}
    others = [one for one in files if one.entry is None]
    if as_json:
        rows = [
            {
                "name": entry.name, "family": entry.family, "role": entry.role, "licence": entry.licence,
                "parameters": entry.parameters, "bytes": entry.bytes, "draft": entry.draft,
                "path": str(here[entry.name].path) if entry.name in here else None,
            }
            for entry in load_catalog().values()
        ]  # fmt: skip
        rows += [{"name": one.path.name, "bytes": one.bytes, "path": str(one.path)} for one in others]
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "role", "size", "licence", "draft", "here"):
        table.add_column(title, justify="right" if title == "size" else "left", no_wrap=True)
    for entry in load_catalog().values():
        mark = "yes" if entry.name in here else "no"
        table.add_row(entry.name, entry.role, _megabytes(entry.bytes), entry.licence, entry.draft or "", mark)
    for one in others:
        table.add_row(one.path.name, "", _megabytes(one.bytes), "", "", "yes")
    Console(markup=False, highlight=False).print(table)
    if len(here) < len(load_catalog()):
        print("\n`edgespec pull NAME` fetches one.")


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Catalogue or file names.", show_default="all that are here")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read models from end to end and compare them with the catalogue, or the SHA256SUMS beside them."""
    checks = [check(one) for one in _chosen(names or [])]
    if as_json:
        print(json.dumps([one._asdict() | {"path": str(one.path)} for one in checks], indent=2))
    else:
        for one in checks:
            print(f"{one.state:<8} {printable(one.path)}")
    if damaged := [one for one in checks if one.state == "damaged"]:
        raise EdgespecError(_advice(damaged))


def _chosen(names: list[str]) -> list[Installed]:
    files = installed()
    called = {name: one for one in files for name in _names(one)}
    if missing := [name for name in names if name not in called]:
        raise EdgespecError(f"{printable(missing[0])} is not on this machine: `edgespec models` lists them.")
    return [called[name] for name in names] or files


def _names(one: Installed) -> list[str]:
    return [one.path.name, *([one.entry.name] if one.entry is not None else [])]


def _advice(damaged: list[Check]) -> str:
    what = ", ".join(printable(one.path.name) for one in damaged)
    return f"damaged: {what}; `edgespec pull` fetches a model again, or unpack again what it came in."


def pull(
    names: Annotated[list[str], typer.Argument(help="Catalogue names: see `edgespec models`.")],
    offline: Annotated[bool, typer.Option(help="Never use the network.")] = False,
    requantise: Annotated[
        bool, typer.Option(help="Make the drafts of pulled models faster for this machine.")
    ] = True,
) -> None:
    """Download models, check them, and keep them for use without a network."""
    pulled = []
    for name in names:
        entry = load_catalog().get(name)
        if entry is None:
            raise EdgespecError(f"{name!r} is not in the catalogue: `edgespec models` lists it.")
        print(fetch(entry, offline))
        pulled.append(entry)
    if requantise:
        quant.make_missing_drafts(pulled)


def fetch(entry: Entry, offline: bool = False) -> Path:
    """Download a model with a bar on the terminal; its verified file. Raises EdgespecError."""
    from edgespec.models.hub import download

    with _download_bar(entry.name) as report, _interruptible():
        return download.pull(entry, models_folder(), offline=offline, progress=report)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C during a download: keep what is there, say so, exit 130."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("edgespec: stopped; run the same command again and it goes on where it was.\n")
        sys.exit(130)


@contextlib.contextmanager
def _download_bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Where nobody watches it would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total, what: bars.update(
            task, completed=done, total=total, description=f"{name}: {what}"
        )


def rm(
    name: Annotated[str, typer.Argument(help="A catalogue name, or a file in the models folder.")],
) -> None:
    """Delete a model from this machine."""
    print(f"freed {_megabytes(remove(name))}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
