"""An engine of scripted parts: no model file, no sensors, no native code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toy import ToyVocab

from edgespec.app.engine.drafters import Drafters
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import Ending
from edgespec.app.engine.slots import Slot, SlotPool
from edgespec.core import Controller, Logits
from edgespec.costs import CostCurve
from edgespec.fakes import Script, noise_script
from edgespec.machine.governor import Governor
from edgespec.models.options import Options
from edgespec.models.simple import SimpleModel, SimpleSummary


class FakeModel(SimpleModel):
    """A Model whose logits are `script`'s; several sequences share a pass, as on llama.cpp."""

    shares_passes = True

    def __init__(self, script: Script | None = None, context: int = 512) -> None:
        vocab: Any = ToyVocab()
        summary = SimpleSummary("fake", vocab.size, "fake", 0)
        super().__init__(Path("fake"), Options(context), summary, vocab)
        self._script = script or noise_script(vocab.size, seed=7, memory=2)
        self.closed = False
        self.passes = 0

    def next_logits(self, tokens: Sequence[int]) -> Sequence[float]:
        return self._script(tokens)

    def forward(self, requests: Sequence[tuple[Any, Sequence[int], int]]) -> list[Logits]:
        self.passes += 1
        return super().forward(requests)

    def close(self) -> None:
        self.closed = True


class FakeResources:
    """Resources without a machine: nothing is measured, nothing is limited."""

    def __init__(self, costs: CostCurve) -> None:
        self.costs = self.measured = costs
        self.governor = Governor("performance")
        self.closed = False

    def begin(self, controller: Controller, drafting: object) -> None: ...
    def steer(self, controllers: object, drafting: object) -> None: ...
    def after(self, round_: object, controllers: object, drafting: object) -> None: ...
    def rest(self, round_: object, cancelled: object) -> None: ...
    def mark(self, running: object) -> None: ...
    def keep(self) -> None: ...

    def ending(self, running: object) -> Ending:
        return Ending("length")

    def close(self) -> None:
        self.closed = True


def fake_engine(parallel: int = 1, model: FakeModel | None = None, drafters: Drafters | None = None) -> Any:
    """An Engine; `engine.model.passes` counts its forward passes. Drafts up to seven tokens cost nothing."""
    model = model or FakeModel()
    costs = CostCurve({n: 0.01 + 0.0001 * n for n in range(1, 9)})
    pool = SlotPool([Slot(model.sequence()) for _ in range(parallel)])
    drafters = drafters or Drafters(most=0, suffix=False)
    return Engine(model, pool, drafters, FakeResources(costs))  # type: ignore[arg-type]
