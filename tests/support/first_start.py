"""How fast planted, repetitive text is written after a first start, against a machine that knows its costs.

    python tests/support/first_start.py MODEL.gguf [--engine ik] [--tokens 500] [--busy]

The text is planted: the model computes every pass, and its logits are replaced by those of the text, so
that a model with random weights will do. With --busy three programs want the processor from before the
model is loaded until its first 100 tokens are written. Both ways take turns in one process; the figure is
the ratio of their speeds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import Request
from edgespec.models.gguf.native import LlamaOptions

CODE = "".join(
    f"    def get_{name}(self) -> str:\n        value = self._{name}\n        return str(value)\n\n"
    for name in ("first", "second", "third", "fourth", "name", "place", "color", "weight", "height", "speed")
)


def planted(engine: Engine, text: Sequence[int]) -> None:
    """Make the engine's model write `text`."""
    compute = engine.model.forward

    def forward(requests: Sequence[tuple[Any, Sequence[int], int]]) -> list[Any]:
        found = compute(requests)
        for (sequence, _, last), rows in zip(requests, found, strict=True):
            for i in range(last):
                at = len(sequence.tokens) - last + i + 1
                rows[i] = 0.0
                rows[i, text[at] if at < len(text) else 0] = 50.0
        return found

    engine.model.forward = forward  # type: ignore[method-assign]


def write(
    path: Path, name: str, cache: Path, text_of: Any, tokens: int, *, busy: bool
) -> tuple[list[float], str]:
    """The times at which tokens of an answer came, and the curve that was known in the end."""
    os.environ["EDGESPEC_CACHE"] = str(cache)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * busy)]
    try:
        with open_engine(
            path, suffix=True, mode="performance", options=LlamaOptions(engine=name, context=2048)
        ) as engine:  # type: ignore[arg-type]
            text = text_of(engine)
            planted(engine, text)
            times = []
            for step in engine.generate(Request(text[:100], max_tokens=tokens)):
                times += [time.monotonic()] * len(step.tokens)
                if len(times) > 100:
                    for one in others:
                        one.kill()
            costs = engine.resources.costs
            figures = {n: round(costs.seconds(n) / costs.pace, 2) for n in (1, 2, 4, 8, 16, 32)}
            return times, f"{1000 * costs.pace:.0f} ms, {figures}"
    finally:
        for one in others:
            one.kill()
            one.wait()


def text_of(engine: Engine) -> list[int]:
    tokens = engine.model.vocab.tokenize(CODE)
    return tokens * (1 + 2000 // len(tokens))


def speed(times: Sequence[float], start: int, stop: int) -> float:
    """Tokens per second between two tokens."""
    last = min(stop, len(times)) - 1
    return (last - start) / (times[last] - times[start])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="llama.cpp")
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--busy", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "known"
        for _ in range(2):  # what a machine knows that has been used
            write(given.model, given.engine, known, text_of, given.tokens, busy=False)
        ratios, parts = [], []
        for turn in range(given.turns):
            fresh = Path(folder) / f"fresh{turn}"
            first, curve = write(given.model, given.engine, fresh, text_of, given.tokens, busy=given.busy)
            again, knew = write(given.model, given.engine, known, text_of, given.tokens, busy=False)
            ratios.append(speed(first, 300, 10**9) / speed(again, 300, 10**9))
            parts.append(speed(first, 0, 300) / speed(again, 0, 300))
            print(f"turn {turn + 1}: after 300 tokens {ratios[-1]:.2f}, before {parts[-1]:.2f}", flush=True)
            print(f"  first start {speed(first, 300, 10**9):.1f} tokens/s, curve {curve}")
            print(f"  known costs {speed(again, 300, 10**9):.1f} tokens/s, curve {knew}")
    print(f"after 300 tokens: {median(ratios):.2f} of known costs ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
