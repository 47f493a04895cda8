"""What several commands have in common: option declarations, and turning options into an engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from edgespec.app import config
from edgespec.app.chat.models import default_model
from edgespec.core import EdgespecError
from edgespec.governor import Mode
from edgespec.models.catalog import load_catalog
from edgespec.models.store import installed, is_onnx, resolve

if TYPE_CHECKING:
    from edgespec.app.engine import Engine
    from edgespec.models.runtime import Options

Backend = Literal["auto", "llama.cpp", "ik"]
Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        envvar="EDGESPEC_MODEL",
        help="A catalogue name, a .gguf file or the folder of an ONNX model.",
        show_default="the largest here that fits the memory",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        help="auto: what the machine gains from; none: plain decoding; suffix: only repeated text; or a "
        "small model with the same vocabulary (name, .gguf file or ONNX folder)."
    ),
]
MaxDraft = Annotated[
    int,
    typer.Option(min=0, max=31, help="Most tokens to guess in one round; fewer are guessed where that pays."),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Greedy answers that are token for token those of plain decoding, near-ties included. Needs a "
        "cache of 8 bits and slower kernels; refused where it cannot be shown to hold.",
    ),
]
System = Annotated[str, typer.Option(help="System prompt.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(min=0, help="Most tokens to write; 0: until the context is full.")]
Context = Annotated[int, typer.Option(min=0, help="Context size in tokens; 0: as large as the model's own.")]
Threads = Annotated[
    int, typer.Option(min=0, max=512, help="Compute threads; 0: one a physical core, within a CPU quota.")
]
Native = Annotated[
    Backend,
    typer.Option(
        help="What computes a GGUF file; auto: EDGESPEC_ENGINE, or what is fastest here, compared at "
        "the first use of a model.",
    ),
]
Governed = Annotated[
    Mode | None,
    typer.Option(
        "--mode",
        help="What the machine may give: performance, balanced, saver (least energy), or auto, which goes by "
        "power supply, battery, heat, memory and other programs.",
        show_default="of the settings, or auto",
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: off.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that sum to p only; 1: off.")]
MinP = Annotated[
    float, typer.Option(help="Drop tokens less likely than this share of the likeliest; 0: off.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: avoid words of prompt and answer.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Avoid words of the answer by how often they came.")]
PresencePenalty = Annotated[float, typer.Option(help="Avoid words that are in the answer.")]
Seed = Annotated[
    int | None, typer.Option(help="Same seed, same text on the same machine.", show_default=False)
]


def load_engine(
    model: str,
    draft: str,
    max_draft: int,
    context: int,
    threads: int,
    progress: Callable[[float], bool] | None = None,
    engine: Backend = "auto",
    exact: bool = False,
    mode: Mode | None = None,
    parallel: int = 1,
) -> Engine:
    """Resolve names and load, with the settings `edgespec tune` found where none are given here.

    Raises EdgespecError for anything the user can mend.
    """
    from edgespec.app.engine import Engine  # llama.cpp is loaded only where it is used

    if exact and engine == "ik":
        raise EdgespecError("--exact needs llama.cpp: leave out --engine ik.")
    name = model or default_model()
    target = resolve(name)
    small: Path | None = None
    if draft == "auto":
        small = partner(name)
    elif draft not in ("none", "suffix"):
        small = resolve(draft)
    notes: list[str] = []
    options, form = _tuned(target, engine, progress, notes.append)
    options = replace(options, context=context)
    if threads:
        options = options.with_threads(threads, threads)
    loaded = Engine(
        target,
        small and form_of(small, form),
        suffix=draft != "none",
        max_draft=0 if draft == "none" else max_draft,
        mode=mode or config.load().mode,
        exact=exact,
        parallel=parallel,
        options=options,
        progress=progress,
    )
    loaded.notes += notes
    return loaded


def partner(name: str) -> Path | None:
    """The draft that the catalogue names for a model, if it is on this machine.

    For an ONNX folder that is named after an entry it is the draft's folder, the same weights first, or file.
    """
    catalog, here = load_catalog(), installed()
    folder = Path(name).name if name not in catalog else ""
    entry = catalog.get(name) or next((e for e in catalog.values() if folder.startswith(f"{e.name}-")), None)
    wanted = entry.draft if entry is not None else None
    if entry is None or wanted is None:
        return None
    files = [one.path for one in here if one.entry is not None and one.entry.name == wanted]
    if folder:
        names = [one.path for one in here if one.entry is None and one.path.name.startswith(f"{wanted}-")]
        folders = [path for path in names if is_onnx(path)]
        alike = f"{wanted}{folder.removeprefix(entry.name)}"
        files = [*sorted(folders, key=lambda path: path.name != alike), *files]
    return next(iter(files), None)


def _tuned(
    target: Path, engine: Backend, progress: Callable[[float], bool] | None, note: Callable[[str], None]
) -> tuple[Options, str]:
    """The settings found for `target` if they are for `engine`, and its draft's form."""
    from edgespec.app import first_use, profile
    from edgespec.models.gguf_check import check_gguf
    from edgespec.models.native import LlamaOptions
    from edgespec.models.onnx import OnnxOptions
    from edgespec.models.onnx_check import check_onnx

    if is_onnx(target):
        if engine != "auto":
            raise EdgespecError(
                f"{target.name} is an ONNX model, which onnxruntime runs: leave out --engine."
            )
        return OnnxOptions(providers=profile.providers(check_onnx(target))), ""
    summary = check_gguf(target)
    engine = _preferred() if engine == "auto" else engine
    found = profile.tuned(summary)
    if found is not None and engine in ("auto", found[0].engine):
        return found
    if engine == "auto":
        return first_use.choose_engine(target, summary, progress, note) or LlamaOptions(), ""
    return LlamaOptions(engine=engine), ""


def _preferred() -> Backend:
    """The engine that the environment names. Raises EdgespecError for one that there is not."""
    name = os.environ.get("EDGESPEC_ENGINE") or "auto"
    if name not in get_args(Backend):
        known = ", ".join(get_args(Backend))
        raise EdgespecError(f"EDGESPEC_ENGINE is {name!r}: set it to one of {known}.")
    return cast(Backend, name)


def form_of(draft: Path, wanted: str) -> Path:
    """The form of `draft` that was found fastest, else the one made of it, else itself."""
    from edgespec.quant.tune import draft_forms, onnx_forms

    if is_onnx(draft):
        return draft
    forms = draft_forms(draft)
    return next((form for form in [*forms, *onnx_forms(draft)] if form.name == wanted), forms[:2][-1])


def parse_bias(entries: list[str]) -> dict[int, float]:
    """`TOKEN_ID=BIAS` entries. Raises EdgespecError for one that is not."""
    bias = {}
    for entry in entries:
        token, _, value = entry.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise EdgespecError(
                f"--logit-bias {entry!r}: write it as TOKEN_ID=BIAS, for example 1234=-5."
            ) from None
    return bias


def piped_input() -> str:
    """What was piped into the program, empty at a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace")
