"""Options that several commands have in common."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgespec.app.engine.loading import BackendChoice
from edgespec.core import EdgespecError
from edgespec.machine.governor import Mode

ModelOption = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        envvar="EDGESPEC_MODEL",
        help="A catalogue name, a .gguf file or the folder of an ONNX model.",
        show_default="the largest here that fits the memory",
    ),
]
DraftOption = Annotated[
    str,
    typer.Option(
        help="auto: what the machine gains from; none: plain decoding; suffix: only repeated text; or a "
        "small model with the same vocabulary (name, .gguf file or ONNX folder)."
    ),
]
MaxDraftOption = Annotated[
    int,
    typer.Option(min=0, max=31, help="Most tokens to guess in one round; fewer are guessed where that pays."),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Greedy answers that are token for token those of plain decoding, near-ties included. Needs a "
        "cache of 8 bits and slower kernels; refused where it cannot be shown to hold.",
    ),
]
SystemOption = Annotated[str, typer.Option(help="System prompt.", show_default=False)]
MaxTokensOption = Annotated[
    int, typer.Option(min=0, help="Most tokens to write; 0: until the context is full.")
]
ContextOption = Annotated[
    int, typer.Option(min=0, help="Context size in tokens; 0: as large as the model's own.")
]
ThreadsOption = Annotated[
    int, typer.Option(min=0, max=512, help="Compute threads; 0: one a physical core, within a CPU quota.")
]
EngineOption = Annotated[
    BackendChoice,
    typer.Option(
        help="What computes a GGUF file; auto: EDGESPEC_ENGINE, or what is fastest here, compared at "
        "the first use of a model.",
    ),
]
ModeOption = Annotated[
    Mode | None,
    typer.Option(
        "--mode",
        help="What the machine may give: performance, balanced, saver (least energy), or auto, which goes by "
        "power supply, battery, heat, memory and other programs.",
        show_default="of the settings, or auto",
    ),
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token every time.")]
TopKOption = Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: off.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the likeliest tokens that sum to p only; 1: off.")]
MinPOption = Annotated[
    float, typer.Option(help="Drop tokens less likely than this share of the likeliest; 0: off.")
]
RepetitionPenaltyOption = Annotated[float, typer.Option(help="Above 1: avoid words of prompt and answer.")]
FrequencyPenaltyOption = Annotated[
    float, typer.Option(help="Avoid words of the answer by how often they came.")
]
PresencePenaltyOption = Annotated[float, typer.Option(help="Avoid words that are in the answer.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Same seed, same text on the same machine.", show_default=False)
]


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
