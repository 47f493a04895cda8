"""`edgespec quant`: make models cheaper to run on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from edgespec.app.cli.options import JsonOption
from edgespec.app.console import bar, interruptible, table
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import Entry, load_catalog
from edgespec.models.hub.elsewhere import belongs_to_other
from edgespec.models.hub.store import models_folder, resolve, verified
from edgespec.text import printable

if TYPE_CHECKING:
    from edgespec.quant.draft import DraftReport

app = typer.Typer(help="Make models cheaper to run on this machine.", no_args_is_help=True)


@app.callback()
def root() -> None: ...


@app.command()
def draft(
    model: Annotated[
        str,
        typer.Argument(
            help="A draft model, or a target whose draft model the catalog names: name or .gguf file."
        ),
    ],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight type to try; repeatable: q4_0, iq4_nl (takes minutes), q8_0, f16, bf16.",
            show_default="q4_0",
        ),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Also try an output head of only this many tokens; 0: do not.")
    ] = 0,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --vocabulary: keep the tokens that are most frequent in this text; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Requantize a draft model, and keep the result if it is faster on this machine."""
    from edgespec.quant.draft import make_draft
    from edgespec.quant.requant import DraftType

    known = get_args(DraftType)
    wanted = kind or ["q4_0"]
    if unknown := [one for one in wanted if one not in known]:
        raise EdgespecError(f"unknown --kind {unknown[0]!r} (valid: {', '.join(known)})")
    kinds = [one for one in known if one in wanted]
    source = draft_of(model)
    with bar(source.name) as progress, interruptible():
        report = make_draft(source, kinds, progress, vocabulary, corpus or ())
    if as_json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print_table(report)


@app.command()
def head(
    model: Annotated[
        str, typer.Argument(help="A model with a layer for multi-token prediction: name or .gguf file.")
    ],
    vocabulary: Annotated[int, typer.Option(min=1, help="Tokens that the head can draft.")] = 32_768,
) -> None:
    """Write the prediction layer of a model as a small file that drafts for all models of its family."""
    from edgespec.quant.head import make_head

    source = _ours(resolve(model))
    with bar(source.name) as progress, interruptible():
        made = make_head(source, vocabulary, progress)
    print(one_line(str(made)))


def draft_of(model: str) -> Path:
    """The file of the draft model that the catalog names for `model`, else of `model` itself."""
    entry = load_catalog().get(model)
    return _ours(resolve(entry.draft if entry is not None and entry.draft else model))


def _ours(path: Path) -> Path:
    """Return `path`. Raises EdgespecError if what is made of it would be in another program's folder."""
    if belongs_to_other(path):
        raise EdgespecError(
            f"{printable(path)} is in the folder of another program, which is only read: "
            f"copy it into {printable(models_folder())} first"
        )
    return path


def make_missing_drafts(pulled: list[Entry]) -> None:
    """After a pull, make the draft models of complete pairs faster, and report the result of each in a line.

    A draft model whose target is not installed is used for chat only and stays as it is. Errors are reported
    as a line, too: without a faster draft model everything works as before.
    """
    from edgespec.quant.draft import make_draft
    from edgespec.quant.requant import made_draft

    catalog, folder = load_catalog(), models_folder()
    pairs = [(one, catalog[one.draft]) for one in catalog.values() if one.draft]
    here = [pair for pair in pairs if not set(pulled).isdisjoint(pair) and (folder / pair[0].file).exists()]
    for draft_entry in dict.fromkeys(pair[1] for pair in here):
        try:
            source = verified(draft_entry, folder)
            if source is None or made_draft(source) is not None:
                continue
            sys.stderr.write(
                f"{draft_entry.name}: measuring whether other weight types draft faster on this machine\n"
            )
            with bar(draft_entry.name) as progress, interruptible():
                outcome = make_draft(source, progress=progress).line
        except EdgespecError as error:
            outcome = f"no faster draft: {error}"
        sys.stderr.write(f"{draft_entry.name}: {one_line(outcome)}\n")


def make_missing_heads(paths: list[Path]) -> None:
    """After a pull, write the prediction layers of the models in `paths` as files that draft for their
    family.

    Errors are reported as a line: without such a file the model's own layer drafts, at a higher cost.
    """
    from edgespec.models.gguf.check import check_gguf
    from edgespec.models.gguf.heads import heads
    from edgespec.quant.head import made_head, make_head

    for path in paths:
        try:
            if not heads(check_gguf(path)) or made_head(path) is not None:
                continue
            with bar(path.name) as progress, interruptible():
                outcome = f"its prediction layer is in {make_head(path, progress=progress).name}"
        except EdgespecError as error:
            outcome = f"no file of its prediction layer: {error}"
        sys.stderr.write(f"{one_line(f'{path.name}: {outcome}')}\n")


def _print_table(report: DraftReport) -> None:
    rows = [
        (
            one.kind, f"{one.bytes / 1e6:,.0f}", f"{one.token:.1f}", f"{one.reading:.1f}",
            "kept" if one is report.best else "",
        )
        for one in report.timings
    ]  # fmt: skip
    print(table(("weights", "MB", "ms per token", "ms per 8 rows", ""), rows, right={1, 2, 3}))
    print(f"\n{report.line}")
    if report.kept is not None:
        print(one_line(str(report.kept)))


def _as_json(report: DraftReport) -> dict[str, object]:
    return {
        "source": str(report.source),
        "kept": None if report.kept is None else str(report.kept),
        "timings": [
            {"kind": one.kind, "bytes": one.bytes, "ms_token": one.token, "ms_read_8": one.reading}
            for one in report.timings
        ],
    }
