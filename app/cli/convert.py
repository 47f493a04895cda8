"""`edgespec quant onnx` and `edgespec quant gguf`: convert a model and compare the result with its source."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from edgespec.app.cli.options import JsonOption
from edgespec.app.console import bar, interruptible, table
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError
from edgespec.models.hub.store import resolve

if TYPE_CHECKING:
    from edgespec.quant.assess import Assessment

_Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text to compare on; repeatable.", show_default="the prompts of `edgespec bench` and the README"
    ),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace an existing model.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `edgespec quant`."""
    app.command()(onnx)
    app.command()(gguf)


def onnx(
    model: Annotated[
        str, typer.Argument(help="Catalog name, .gguf file, folder of a checkpoint, or its name on the Hub.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    bits: Annotated[int, typer.Option(help="Bits per weight: 4 or 8.")] = 4,
    text: _Text = None,
    force: _Force = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model to an ONNX folder and compare the two (needs edgespec[export])."""
    from edgespec.quant.export import export_onnx, find_source, refuse_destination, require_extra

    if bits not in (4, 8):
        raise EdgespecError(f"invalid --bits {bits} (valid: 4, 8)")
    require_extra()
    corpus = _corpus(text)
    refuse_destination(out, force)
    source = find_source(model)
    with bar(source.path.name, lines=True) as progress, interruptible():
        export_onnx(source, out, 4 if bits == 4 else 8, force=force, progress=progress)
        _compare(source.path, out, corpus, progress, as_json)


def gguf(
    model: Annotated[str, typer.Argument(help="Catalog name or .gguf file.")],
    kind: Annotated[str, typer.Option("--type", help="Weight type: q4_0, q4_k_m, q8_0, bf16 and others.")],
    out: Annotated[Path, typer.Option(help="The .gguf file to write.")],
    text: _Text = None,
    force: _Force = False,
    as_json: JsonOption = False,
) -> None:
    """Write a GGUF file in another weight type and compare the two."""
    from edgespec.quant.requant import DraftType, Mixture, requantize

    known: dict[str, DraftType | Mixture] = {one: one for one in (*get_args(DraftType), *get_args(Mixture))}
    if kind.lower() not in known:
        raise EdgespecError(f"unknown --type {kind!r} (valid: {', '.join(known)})")
    corpus = _corpus(text)
    if os.path.lexists(out) and not (force and out.is_file()):
        advice = "choose another name" if out.is_dir() else "choose another name, or --force to replace it"
        raise EdgespecError(f"{out} exists: {advice}")
    source = resolve(model)
    with bar(source.name, lines=True) as progress, interruptible():
        requantize(source, out, known[kind.lower()], partial(progress, f"writing {kind.lower()}"), pure=False)
        _compare(source, out, corpus, progress, as_json)


def own_text() -> str:
    """The prompts of `edgespec bench` and the README: about 3,000 tokens."""
    from importlib import metadata  # slow to import

    from edgespec.app.bench.measure import read_suite

    readme = ""
    with suppress(metadata.PackageNotFoundError):  # a frozen program has only the prompts
        readme = metadata.metadata("edgespec")["Description"]
    return "\n\n".join([*(prompt.text for prompt in read_suite(None, 1000)), readme])


def _corpus(paths: list[Path] | None) -> str:
    from edgespec.quant.draft import read_text

    return "\n\n".join(map(read_text, paths)) if paths else own_text()


def _compare(
    source: Path, made: Path, text: str, progress: Callable[[str, float], bool], as_json: bool
) -> None:
    from edgespec.quant.assess import assess

    try:
        found = assess(source, made, text, progress)
    except EdgespecError as error:  # the file is good, and took minutes
        raise EdgespecError(f"{made} is written but cannot be compared: {error}") from None
    if as_json:
        print(json.dumps({"source": str(source), "made": str(made), **asdict(found)}, indent=2))
    else:
        _print(source, made, found)


def _print(source: Path, made: Path, found: Assessment) -> None:
    sizes = {"source": found.source_bytes, "made": found.made_bytes}
    names = {"source": source.name, "made": made.name}
    rows = []
    for which, size in sizes.items():
        times = found.milliseconds.get(which)
        cells = [] if times is None else [f"{1000 / times[1]:.1f}", *(f"{one:.1f}" for one in times.values())]
        rows.append([one_line(names[which]), f"{size / 1e6:,.0f}", *cells])
    print(table(("", "MB", "tokens/s", "1 row, ms", "4 rows", "8 rows"), rows, right=range(1, 6)))
    agreement = found.agreement
    print(
        f"\n{agreement.top1:.1%} of {agreement.tokens} next tokens match the source; "
        f"KL divergence {agreement.divergence:.4f} nats"
    )
    if not found.same_tokens:
        print("the two tokenize the text differently: do not use one to draft for the other")
    print(one_line(str(made)))
