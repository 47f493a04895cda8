"""`edgespec models`, `pull` and `rm`: list, verify, download and delete models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from edgespec.app.cli import quant
from edgespec.app.cli.options import JsonOption
from edgespec.app.console import interruptible, table
from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import Entry, load_catalog
from edgespec.models.hub.store import Check, Installed, check, installed, models_folder, remove
from edgespec.text import printable

app = typer.Typer(help="List the catalog and the installed models.", invoke_without_command=True)


@app.callback()
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the catalog and the installed models."""
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
    lines: list[tuple[str, ...]] = [
        (
            entry.name, entry.role, _megabytes(entry.bytes), entry.licence, entry.draft or "",
            "yes" if entry.name in here else "no",
        )
        for entry in load_catalog().values()
    ]  # fmt: skip
    lines += [(printable(one.path.name), "", _megabytes(one.bytes), "", "", "yes") for one in others]
    print(table(("name", "role", "size", "license", "draft", "installed"), lines, right={2}))
    if len(here) < len(load_catalog()):
        print("\n`edgespec pull NAME` downloads a model")


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
    files = installed()
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
    names: Annotated[list[str], typer.Argument(help="Catalog names: see `edgespec models`.")],
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
    pulled = []
    for name in names:
        entry = load_catalog().get(name)
        if entry is None:
            raise EdgespecError(f"unknown model {name!r}: `edgespec models` lists the catalog")
        print(fetch(entry, offline))
        pulled.append(entry)
    if requantize:
        quant.make_missing_drafts(pulled)


def fetch(entry: Entry, offline: bool = False) -> Path:
    """Download a model with a progress bar and return its verified file. Raises EdgespecError."""
    from edgespec.models.hub import download

    with _download_bar(entry.name) as report, interruptible("run the same command again to resume"):
        return download.pull(entry, models_folder(), offline=offline, progress=report)


@contextlib.contextmanager
def _download_bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Without a terminal it would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total, what: bars.update(
            task, completed=done, total=total, description=f"{name}: {what}"
        )


def rm(
    name: Annotated[str, typer.Argument(help="A catalog name, or a file in the models folder.")],
) -> None:
    """Delete a model from this machine."""
    print(f"freed {_megabytes(remove(name))}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
