"""The other end of `trial`: loads an engine and a model in a process of its own and evaluates with it.

One request on standard input, reports on standard output, all JSON and a line each. What it finds is right or
wrong by comparing batches of many rows with single ones.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgespec.core import EdgespecError, Logits
from edgespec.machine.sensors import process_memory
from edgespec.models.gguf import kernels, trial
from edgespec.models.gguf.backends import library
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import LlamaOptions

SIZES = (2, 3, 4, 8, 16, 32)
PROMPT = 128
_FLOOR = 0.1  # nats: logits that differ by less are those of a model that says nothing


def main() -> int:
    """Do what the line on standard input asks for. 0, or it dies."""
    _prepare()
    _say({"ready": True})
    request = _request()
    # What the process that asks would load, and from nowhere else: its own paths are what counts.
    sys.path[:] = request["paths"]
    trial.trust(request["kernels"])
    try:
        if request["kernels"] == trial.ASK:
            _say({"variants": kernels.ranked()})
            return 0
        _say({"build": library(request["engine"]).build})
        if "model" in request:
            _try_model(Path(request["model"]), LlamaOptions(**request["options"]))
    except EdgespecError as error:
        _say({"refused": str(error)})
    return 0


def _try_model(path: Path, options: LlamaOptions) -> None:
    """Report the largest difference of any batch from single rows."""

    def on_progress(fraction: float) -> bool:
        _say({"loading": fraction})
        return True

    with LlamaModel(path, options, on_progress) as model:
        experts = model.summary.metadata.get(f"{model.summary.architecture}.expert_count", 0)
        found = {}
        for name, single, many in _batches(model.sequence()):
            _say({"rows": name})
            # Rounding may send a row to another expert, and change it a lot, but not most of the rows.
            rows = differences(single, many)
            found[name] = float(np.median(rows) if experts else rows.max(initial=0.0))
        memory = process_memory(os.getpid())
    _say({"difference": max(found.values()), "differences": found, "memory": memory})


def _batches(sequence: LlamaSequence) -> Iterator[tuple[str, Logits, Logits]]:
    """The logits of the same tokens by single rows and in a batch, for a prompt and for each of SIZES."""
    text = [(37 * i * i + 11 * i + 5) % sequence.vocab_size for i in range(PROMPT + max(SIZES))]
    # Without the token that begins every text some models amplify any rounding ten times.
    text[0] = sequence.model.vocab.bos or text[0]
    most = sequence.model.options.max_rows
    single = {}
    for i, token in enumerate(text):
        row = sequence.forward([token])[0]
        if i >= PROMPT - most:
            single[i] = row.copy()
        _say({"row": i})
    for name, start, end in [("prompt", 0, PROMPT), *((str(n), PROMPT, PROMPT + n) for n in SIZES)]:
        sequence.rollback(start)
        if missing := text[len(sequence.tokens) : start]:  # a memory that cannot be cut
            sequence.forward(missing)
        rows = min(end - start, most)
        many = sequence.forward(text[start:end], rows)
        yield name, np.stack([single[i] for i in range(end - rows, end)]), many


def differences(single: Logits, many: Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far each row of `many` is from that of `single`, both [rows, vocab]: float64 [rows].

    The root mean square of the logits' changes, in standard deviations of the row's logits; what all logits
    of a row have in common changes nothing. Rows that are finite in one of the two only differ infinitely,
    rows that are in neither say nothing.
    """
    finite = np.isfinite(single).all(axis=1), np.isfinite(many).all(axis=1)
    result = np.where(finite[0] == finite[1], 0.0, np.inf)
    for i in np.flatnonzero(finite[0] & finite[1]):
        one = single[i].astype(np.float64)
        result[i] = (many[i] - one).std() / max(one.std(), _FLOOR)
    return result


def _request() -> Mapping[str, Any]:
    """The line on standard input; when that is closed later, nobody waits for an answer any more."""
    data = b""
    while not data.endswith(b"\n"):
        if not (piece := os.read(0, 65536)):
            os._exit(1)
        data += piece

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    request: dict[str, Any] = json.loads(data)
    return request


def _prepare() -> None:
    """A crash leaves no core file and shows no window; when memory runs out, this process goes first."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)  # no window for critical errors, faults and absent files
    else:
        import resource

        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    # The engine's own errors: how it ran out of memory, before it aborts.
    logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)


def _say(report: Mapping[str, Any]) -> None:
    sys.stdout.write(f"\n{json.dumps(report)}\n")  # after what an engine may have left without an end
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
