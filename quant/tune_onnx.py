"""Where an ONNX model runs fastest on this machine, and how the same model as a GGUF file compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from edgespec.core import EdgespecError, NamedProgress
from edgespec.models.gguf.native import BackendName, LlamaOptions
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.store import models_folder
from edgespec.models.onnx import providers
from edgespec.models.onnx.model import OnnxModel, OnnxOptions
from edgespec.quant.timing import Candidate, Figures, TimingBench, TimingBudget, scaled, undisturbed

_ROWS = (1, 4)  # of a small round: plain decoding, and verifying a few draft tokens
_REPEATS = 5
EFFORT = TimingBudget((1, 2, 4, 8, 16), 256, 6.0, prompts=4, least=6, most=12, seconds=40.0, repeats=2)
QUICK = TimingBudget((1, 2, 4, 8, 16), 64, 1.0, prompts=2, least=4, most=6, seconds=6.0, repeats=1)


@dataclass(frozen=True, slots=True)
class OnnxTuneReport:
    """`providers`: the speed of each. `engines`: seconds by rows of each engine that runs the same model."""

    found: providers.Measured
    engines: Mapping[str, Figures]
    notes: tuple[str, ...]


def tune(folder: Path, other: Path | None, *, quick: bool, progress: NamedProgress) -> OnnxTuneReport:
    """Time the model in `folder` on every provider, and the GGUF file `other` on every engine, interleaved.

    Raises EdgespecError when it runs nowhere, Cancelled when `progress` stopped it.
    """
    offered = providers.offered()
    share = 0.4 / len(offered)

    def report(name: str) -> bool:
        return progress(name, share * [providers.label(one) for one in offered].index(name))

    found = providers.measure(offered, lambda name: seconds_on(folder, name), report)
    if providers.CPU in found.failed and len(found.failed) == len(offered):
        raise EdgespecError(found.failed[providers.CPU])
    first = found.order(offered)[0]
    variants = {
        f"onnxruntime {providers.label(first)}": Candidate(folder, OnnxOptions(512, providers=(first,)))
    }
    if other is not None:
        engines: tuple[BackendName, ...] = ("llama.cpp", "ik")
        variants |= {name: Candidate(other, LlamaOptions(context=512, engine=name)) for name in engines}
    with TimingBench(
        QUICK if quick else EFFORT, 1, lambda what, part: progress(what, 0.4 + 0.6 * part)
    ) as bench:
        for name, variant in list(variants.items()):
            try:
                bench.open(variant, name)
            except EdgespecError as error:
                bench.notes.append(f"{name} was not timed: {error}")
                del variants[name]
        rounds = bench.race(variants, bench.all) if variants else []
        base = undisturbed(rounds[0]) if rounds else {}
        figures = {name: scaled(base, rounds[0], one) for name, one in zip(variants, rounds, strict=True)}
        return OnnxTuneReport(found, figures, tuple(bench.notes))


def seconds_on(folder: Path, provider: str) -> float:
    """Seconds of a small round on `provider`, without help from another.

    Raises EdgespecError where it does not load, does not run, or computes what is not a number.
    """
    with OnnxModel(folder, OnnxOptions(context=128, max_rows=max(_ROWS), providers=(provider,))) as model:
        sequence = model.sequence()
        text = [7 * i % model.vocab.size for i in range(16 + max(_ROWS))]
        logits = sequence.forward(text[:16], max(_ROWS))
        if not np.isfinite(logits).all():
            raise EdgespecError("it computes what is not a number.")
        total = 0.0
        for rows in _ROWS:
            times = []
            for _ in range(_REPEATS):
                start = perf_counter()
                sequence.forward(text[16 : 16 + rows], rows)
                times.append(perf_counter() - start)
                sequence.rollback(16)
            total += median(times)
        return total


def gguf_of(folder: Path) -> Path | None:
    """The catalogue's file that an ONNX folder is named after, if it is on this machine."""
    for entry in load_catalog().values():
        path = models_folder() / entry.file
        if folder.name.startswith(f"{entry.name}-") and path.is_file():
            return path
    return None
