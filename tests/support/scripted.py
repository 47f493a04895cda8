"""Systems of a comparison that answer at a given speed."""

from __future__ import annotations

from collections.abc import Sequence

from edgespec.app.bench.systems import SystemAnswer


def answered(
    tokens_per_second: float, *, tokens: Sequence[int] = (1, 2, 3), first: float = 0.5, **counts: int
):
    """An answer of three tokens at a speed in tokens per second."""
    return SystemAnswer(
        (9,), tuple(tokens), 3, first, first + 2 / tokens_per_second, **{"rounds": 3, **counts}
    )


class Scripted:
    """A system that answers at a speed, and logs its calls."""

    def __init__(self, name: str, rate: float = 1.0, *, memory: int = 0, remembers: bool = False) -> None:
        self.name, self.rate, self.memory, self.remembers = name, rate, memory, remembers
        self.plain = f"{name.partition(' ')[0]} plain"
        self.started = 0
        self.log: list[str] = []

    def start(self) -> None:
        self.started += 1
        self.log.append("start")

    def stop(self) -> None:
        self.log.append("stop")

    def ask(self, prompt: Sequence[int], max_tokens: int) -> SystemAnswer:
        self.log.append(f"ask {prompt[0]}")
        return answered(self.rate)
