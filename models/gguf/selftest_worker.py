"""The child process of `trial`: loads an engine and a model, and compares batches with single rows.

It reads one request from standard input and writes reports to standard output, each a line of JSON.
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
_FLOOR = 0.1  # minimum standard deviation of the logits: a smaller one is of a meaningless distribution


def main() -> int:
    """Serve the request on standard input and return 0, unless native code kills the process."""
    _prepare()
    _report({"ready": True})
    request = _request()
    # Import the same code as the parent process.
    sys.path[:] = request["paths"]
    trial.trust(request["kernels"])
    try:
        if request["kernels"] == trial.ASK:
            _report({"variants": kernels.ranked()})
            return 0
        _report({"build": library(request["engine"]).build})
        if "model" in request:
            _try_model(Path(request["model"]), LlamaOptions(**request["options"]))
    except EdgespecError as error:
        _report({"refused": str(error)})
    return 0


def _try_model(path: Path, options: LlamaOptions) -> None:
    """Report the largest difference of a batch from single rows."""

    def on_progress(fraction: float) -> bool:
        _report({"loading": fraction})
        return True

    with LlamaModel(path, options, on_progress) as model:
        experts = model.summary.metadata.get(f"{model.summary.architecture}.expert_count", 0)
        found = {}
        for name, single, many in _batches(model.sequence()):
            _report({"rows": name})
            # Rounding may select another expert and change a row a lot, but not most rows.
            rows = differences(single, many)
            found[name] = float(np.median(rows) if experts else rows.max(initial=0.0))
        memory = process_memory(os.getpid())
    _report({"difference": max(found.values()), "differences": found, "memory": memory})


def _batches(sequence: LlamaSequence) -> Iterator[tuple[str, Logits, Logits]]:
    """Yield the logits of the same tokens as single rows and as a batch: a prompt, then each of SIZES."""
    text = [(37 * i * i + 11 * i + 5) % sequence.vocab_size for i in range(PROMPT + max(SIZES))]
    # Without the beginning-of-sequence token some models amplify rounding errors ten times.
    text[0] = sequence.model.vocab.bos or text[0]
    most = sequence.model.options.max_rows
    single = {}
    for i, token in enumerate(text):
        row = sequence.forward([token])[0]
        if i >= PROMPT - most:
            single[i] = row.copy()
        _report({"row": i})
    for name, start, end in [("prompt", 0, PROMPT), *((str(n), PROMPT, PROMPT + n) for n in SIZES)]:
        sequence.rollback(start)
        if missing := text[len(sequence.tokens) : start]:  # its rows cannot be taken back
            sequence.forward(missing)
        rows = min(end - start, most)
        many = sequence.forward(text[start:end], rows)
        yield name, np.stack([single[i] for i in range(end - rows, end)]), many


def differences(single: Logits, many: Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the difference of each row of `many` from that of `single`, both [rows, vocab]: float64 [rows].

    It is the standard deviation of the logits' changes, in standard deviations of the row's logits, so that a
    constant added to all logits counts as 0. It is infinite for rows that are finite in only one of the two,
    and 0 for rows that are finite in neither.
    """
    finite = np.isfinite(single).all(axis=1), np.isfinite(many).all(axis=1)
    result = np.where(finite[0] == finite[1], 0.0, np.inf)
    for i in np.flatnonzero(finite[0] & finite[1]):
        one = single[i].astype(np.float64)
        result[i] = (many[i] - one).std() / max(one.std(), _FLOOR)
    return result


def _request() -> Mapping[str, Any]:
    """Return the request from standard input; exit when that is closed later, because the parent is gone."""
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
    """Disable core files and error windows; let the kernel kill this process first if memory runs out."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)  # no window for critical errors, faults and absent files
    else:
        import resource

        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    # The engine logs an allocation failure before it aborts.
    logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)


def _report(values: Mapping[str, Any]) -> None:
    sys.stdout.write(f"\n{json.dumps(values)}\n")  # an engine may have written an incomplete line
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
