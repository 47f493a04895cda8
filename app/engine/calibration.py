"""Measurements of this machine in the cache folder: cost curves, acceptance, and the best settings.

Everything here can be measured again: a file that is missing, damaged or of another version is ignored, and
one that cannot be written is skipped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from typing import get_args

from edgespec.acceptance import Acceptance
from edgespec.core import EdgespecError
from edgespec.costs import CostCurve, measure
from edgespec.machine.sensors import ProcessorLoad, compute_cores, cpu_name
from edgespec.models import machine_cache
from edgespec.models.exact import equal_sizes
from edgespec.models.gguf.backends import library
from edgespec.models.gguf.native import BackendName, LlamaOptions
from edgespec.models.machine_cache import digest, load, save
from edgespec.models.onnx.model import build
from edgespec.models.onnx.providers import CPU, Measured, offered
from edgespec.models.options import Options
from edgespec.models.runtime import Model, ModelSequence, Summary, runtime_for
from edgespec.overlap import Together, measure_together

_PANGRAMS = (
    "The quick brown fox jumps over 13 lazy dogs; 'pack my box', she wrote, \"with five dozen jugs\".\n"
    "def sphinx(quartz: int) -> str:\n    return f'{quartz * 7:,.2f}'  # Zwölf Boxkämpfer jagen Viktor\n"
)
_TUNED = ("engine", "threads", "threads_batch", "flash_attention", "repack")
_FIRST = (8, 4, 16, 2, 32, 6, 12, 3, 5, 24)  # rows in the order in which they are worth measuring
_FIRST_SECONDS = 0.9
_BANDWIDTH = 10e9  # bytes of weights per second, assumed before any pass
_BUSY = 0.25  # share of the cores that other programs use, above which a measurement is worthless
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError)  # raised for a damaged file


def cost_key(summary: Summary, options: Options) -> str:
    """Return the key of a pass's cost: kernels, processor, threads, shapes and types of the weights.

    Two files that differ only in the values of their weights cost the same, so these are not hashed.
    """
    return digest((cpu_name(), *runtime_for(options).cost_key(options), *_shape(summary)))


def tuned_key(summary: Summary) -> str:
    """Return the key of what tuned settings depend on: processor, shapes and types of the weights."""
    return digest((cpu_name(), compute_cores(), *_shape(summary)))


def _shape(summary: Summary) -> tuple[object, ...]:
    return summary.architecture, summary.vocab_size, summary.parameters, sorted(summary.types.items())


def known_curve(summary: Summary, options: Options) -> CostCurve | None:
    """Return the cost curve of an earlier run, None if there is none."""
    data = load("costs", cost_key(summary, options))
    if data is not None:
        with contextlib.suppress(*_DAMAGE):
            return CostCurve.from_json(data, _prior(summary, options))
    return None


def _prior(summary: Summary, options: Options) -> Mapping[int, float]:
    return runtime_for(options).cost_prior(summary.types, options)


def with_threads(model: Model, threads: tuple[int, int]) -> Options:
    """Return the options of `model` with other thread counts, for passes of one row and of several."""
    return model.options.with_threads(*threads)


def curve(
    sequence: ModelSequence,
    note: Callable[[str], None],
    threads: tuple[int, int] | None = None,
    bandwidth: float = _BANDWIDTH,
    *,
    fresh: bool = False,
) -> CostCurve:
    """Return the cost curve of the sequence's model: a prior, earlier runs, and at most a second of passes.

    Measures the sizes that were never seen and fit into the second; passes of generations refine the others.
    A measurement while other programs used the processor is dropped: until its first pass, one row is assumed
    to read the weights at `bandwidth`, in bytes per second. `threads` other than the model's stay set.
    """
    found = _curve(sequence, note, threads or sequence.model.threads, bandwidth, fresh)
    if sequence.model.undo is not None:
        found.undo = sequence.model.undo
    return found


def _curve(
    sequence: ModelSequence,
    note: Callable[[str], None],
    threads: tuple[int, int],
    bandwidth: float,
    fresh: bool,
) -> CostCurve:
    model = sequence.model
    options, most = with_threads(model, threads), model.options.max_rows
    known = None if fresh else known_curve(model.summary, options)
    wanted = [n for n in _FIRST if n <= most]
    if known is not None:
        room = _FIRST_SECONDS - 2 * known.pace
        wanted = [n for n in wanted if n not in known.seen and known.seconds(n) < room]
        if not wanted:
            return known
    first = known is None
    known = known or CostCurve(
        {1: model.summary.tensor_bytes / bandwidth},
        prior_slope(model),
        most,
        prior=_prior(model.summary, options),
        measured=False,
    )
    model.set_threads(*threads)
    load = ProcessorLoad()
    try:
        figures, noise = measure(_runner(sequence), wanted, _FIRST_SECONDS, known.seconds)
    finally:
        sequence.rollback(0)
    busy = load().get("others", 0.0)
    if busy > _BUSY:
        note(f"other programs use {busy:.0%} of the processor: {model.path.name} is measured later")
        return known
    known.measured(figures, noise)
    keep(model, known, threads, busy)
    if first:
        note(f"measured the costs of {model.path.name} on this machine; generations refine them")
    return known


def keep(model: Model, curve: CostCurve, threads: tuple[int, int], load: float | None = None) -> None:
    """Save `curve`, with the time and the share of the cores that other programs used, if known."""
    data = {**curve.as_json(), "time": round(time.time()), "load": load}
    save("costs", cost_key(model.summary, with_threads(model, threads)), data)


def exact_sizes(sequence: ModelSequence, note: Callable[[str], None]) -> list[int]:
    """Return the batch sizes with bit-identical results, from an earlier run or checked now.

    Raises EdgespecError if one row is the only one.
    """
    model = sequence.model
    key = cost_key(model.summary, model.options)
    data = load("exact", key)
    sizes = data.get("sizes") if data else None
    if not isinstance(sizes, list) or 1 not in sizes or not all(type(n) is int and n > 0 for n in sizes):
        note(f"checked which batches of {model.path.name} are bit-identical to single tokens")
        text = model.vocab.tokenize(_PANGRAMS * 24)
        sizes = equal_sizes(sequence, text, model.options.max_rows)
        save("exact", key, {"sizes": sizes})
    if sizes[-1:] == [1]:
        raise EdgespecError(
            f"{model.path.name} cannot be sped up exactly here, where batches round differently from "
            "single tokens: leave out --exact, or decode plainly with --draft none"
        )
    return sizes


def keep_tuned(summary: Summary, options: LlamaOptions, draft: str = "") -> None:
    """Save the settings that were best for a model here, and the file name of its draft's best form."""
    data = {name: getattr(options, name) for name in _TUNED}
    key = tuned_key(summary)
    save("tuned", key, {**data, "build": library(options.engine).build, "draft": draft})
    machine_cache.forget("told", key)  # when these are outdated, the user is notified again


def tuned(summary: Summary) -> tuple[LlamaOptions, str] | None:
    """Return what `keep_tuned` saved, None if there is nothing, or if its engine was changed or removed."""
    data = load("tuned", tuned_key(summary))
    if data is None:
        return None
    try:
        options = LlamaOptions(**{name: data[name] for name in _TUNED})
        threads = options.threads, options.threads_batch
        sound = (
            options.engine in get_args(BackendName)
            and all(type(n) is int and 0 <= n <= 512 for n in threads)
            and options.flash_attention in (None, True, False)
            and isinstance(options.repack, bool)
            and isinstance(data["draft"], str)
        )
        if not sound or library(options.engine).build != data["build"]:
            return None
    except (*_DAMAGE, EdgespecError):
        return None
    return options, data["draft"]


def overlap_factors(target: ModelSequence, draft: ModelSequence, note: Callable[[str], None]) -> Together:
    """Return how two models slow each other down, from an earlier run or measured now in a second."""
    models = target.model, draft.model
    key = digest(tuple(cost_key(model.summary, with_threads(model, model.threads)) for model in models))
    data = load("together", key)
    if data is not None:
        with contextlib.suppress(*_DAMAGE):
            known = Together(float(data["target"]), float(data["draft"]))
            if 0.1 <= known.target <= 100.0 and 0.1 <= known.draft <= 100.0:
                return known
    note(f"measured {models[0].path.name} and {models[1].path.name} running at the same time")
    runs = [_runner(sequence) for sequence in (target, draft)]
    try:
        found = measure_together(lambda: runs[0](4), lambda: runs[1](1))
    finally:
        target.rollback(0)
        draft.rollback(0)
    save("together", key, {"target": found.target, "draft": found.draft})
    return found


def vocabularies_match(target: str, draft: str) -> bool:
    """Whether `keep_match` saved that the vocabularies of these digests match."""
    return load("agree", digest((target, draft))) is not None


def keep_match(target: str, draft: str) -> None:
    save("agree", digest((target, draft)), {})


def providers(summary: Summary) -> tuple[str, ...]:
    """Return the execution providers to try for an ONNX model, in order, by what was measured here."""
    return tuple(provider_figures(summary).order(offered()))


def provider_figures(summary: Summary) -> Measured:
    """Return what `keep_providers` saved for models of this shape and this onnxruntime, empty if nothing."""
    data = load("providers", _providers_key(summary))
    if data is not None:
        with contextlib.suppress(*_DAMAGE):
            seconds = {str(name): float(s) for name, s in data["seconds"].items()}
            failed = {str(name): str(why) for name, why in data["failed"].items()}
            if all(0.0 < s < 3600.0 for s in seconds.values()):
                return Measured(seconds, failed)
    return Measured()


def keep_providers(summary: Summary, found: Measured) -> None:
    save("providers", _providers_key(summary), {"seconds": dict(found.seconds), "failed": dict(found.failed)})


def _providers_key(summary: Summary) -> str:
    return digest((cpu_name(), compute_cores(), build(CPU), *offered(), *_shape(summary)))


def first_time(key: str) -> bool:
    """Whether this is the first call for `key`. False where that cannot be saved."""
    if load("told", key) is not None:
        return False
    save("told", key, {})
    return load("told", key) is not None


def prior_slope(model: Model) -> float:
    """Return the relative cost of each token in the cache, before measurements: as bytes to be read."""
    return min(1e-3, model.cache_bytes / model.context_length / model.summary.tensor_bytes)


def acceptance(target: Model) -> Acceptance:
    data = load("acceptance", target.summary.tokenizer_digest[:24])
    if data is not None:
        with contextlib.suppress(*_DAMAGE):
            return Acceptance.from_json(data)
    return Acceptance()


def keep_acceptance(target: Model, known: Acceptance) -> None:
    save("acceptance", target.summary.tokenizer_digest[:24], known.as_json())


def _runner(sequence: ModelSequence) -> Callable[[int], None]:
    """Return a function that evaluates n rows after a few tokens, with all logits, and removes them again.

    The rows go on through a text from pass to pass: each token of a mixture selects other experts, whose
    weights a repeated one would find in the processor's caches.
    """
    text = sequence.model.vocab.tokenize(_PANGRAMS)
    sequence.forward(text[:8])
    tokens = cycle(text[8:])

    def run(rows: int) -> None:
        # A single row is never taken back, so that its cost is without that of a recurrent layer's state.
        held = len(sequence.tokens)
        sequence.forward(list(islice(tokens, rows)), rows)
        if rows > 1:
            sequence.rollback(held)

    return run
