"""Keeps an engine's rounds within the machine's resources: turns readings into threads and budgets.

Belongs to the thread that owns the models. Nothing here changes an answer, near-ties aside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from edgespec.app.engine import calibration
from edgespec.app.engine.request import Ending
from edgespec.app.engine.running import RunningRequest
from edgespec.core import Controller, Reading, Round
from edgespec.costs import CostCurve
from edgespec.machine.energy import Mark, Meter
from edgespec.machine.governor import LADDER, Decision, Governor, Mode, best_threads
from edgespec.machine.monitor import SensorMonitor
from edgespec.machine.thread_search import ThreadSearch
from edgespec.models.runtime import Model, ModelSequence

_SLICE = 0.05  # seconds of a rest after which a canceled answer ends


class ResourceController:
    """The governor of one engine, with its sensors and its meter."""

    def __init__(
        self,
        sequence: ModelSequence,
        costs: CostCurve,
        mode: Mode = "auto",
        *,
        most: int = 31,
        fixed_threads: bool = False,
        watch: SensorMonitor | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`costs` are those of the model's threads as loaded, which are those of performance.

        `fixed_threads`: no mode may change them. `watch` is started here and closed by `close`.
        """
        self._sequence, self._model, self._note = sequence, sequence.model, note
        self.loaded = self._model.threads  # and of performance, without other programs
        self._curves = {self.loaded: costs}
        self._costs = costs
        self._fixed = fixed_threads
        self._measurable = costs.largest > 1  # a model that cannot be rolled back is not
        self._thread_search: ThreadSearch | None = None
        self._crowd_curves: dict[int, CostCurve] = {}
        self.governor = Governor(mode, most=most)
        self.watch = watch or SensorMonitor()
        self.meter = Meter(self.watch.latest)
        self._marks: dict[RunningRequest, Mark] = {}
        self._read: Reading | None = None
        self._decisions: list[tuple[Mode, str]] = []
        self.watch.start()

    def close(self) -> None:
        self.watch.close()

    @property
    def costs(self) -> CostCurve:
        """The current curve."""
        return self._costs

    @property
    def measured(self) -> CostCurve:
        """The curve of the threads as loaded, without other programs."""
        return self._curves[self.loaded]

    def begin(self, controller: Controller, drafting: Model | None) -> None:
        """Start an answer. Thread counts whose costs the mode needs are measured first, once.

        In the mode auto, one count per answer, so that no answer is delayed for long.
        """
        if self._measurable and not self._fixed and not self.governor.threads and self._may_save():
            self._measure_threads()
        self._read, self._decisions = None, []
        self.steer([controller], drafting)

    def steer(self, controllers: Sequence[Controller], drafting: Model | None) -> None:
        """Before a pass: apply the decision for the newest reading to the controllers of all generations."""
        latest = self.watch.latest()
        if self._read is not None and latest.time == self._read.time:
            return
        self.meter.tick(latest)
        curve = self._curves.get(self._model.threads)
        self._read = replace(latest, slowdown=curve.slowdown if curve and not self._thread_search else None)
        self._apply(self.governor.decide(self._read), controllers, drafting)

    def after(self, round_: Round, controllers: Sequence[Controller], drafting: Model | None) -> None:
        """After a pass, of which `round_` is one generation's: try thread counts if other programs run."""
        if self._thread_search is None or not round_.timed:
            return
        threads, calm = self._thread_search.threads, self._curves[self.loaded]
        rows = round_.draft.rows + round_.shared.rows
        slowness = self._thread_search.observe(calm.seconds(rows, len(self._sequence.tokens)), round_.waiting)
        if slowness is not None:
            self._crowd_curve(threads).pace = slowness * calm.pace
        if threads != self._thread_search.threads:
            self._apply(self.governor.decision, controllers, drafting)

    def rest(self, round_: Round, cancelled: Callable[[], bool]) -> None:
        """After a round: make the pause of its budget."""
        end = time.monotonic() + self.governor.decision.budget.rest * round_.seconds
        while not cancelled() and (left := end - time.monotonic()) > 0.0:
            time.sleep(min(left, _SLICE))

    def mark(self, running: RunningRequest) -> None:
        """Measure what is used for `running` from here on, including what others use in the same passes."""
        self._marks[running] = self.meter.mark()

    def ending(self, running: RunningRequest) -> Ending:
        """Return what was used since `mark`, and the modes with their reasons."""
        mark = self._marks.pop(running, None)
        energy = self.meter.since(mark) if mark is not None else None
        return Ending("length", energy=energy, modes=self._decisions, reading=self._read)

    def keep(self) -> None:
        """Save the cost curves."""
        for threads, curve in self._curves.items():
            if curve.largest > 1:
                calibration.keep(self._model, curve, threads)

    def _may_save(self) -> bool:
        mode = self.governor.mode
        return mode in ("balanced", "saver") or (
            mode == "auto" and self.watch.latest().plugged is not None  # there is a battery
        )

    def _apply(self, decision: Decision, controllers: Sequence[Controller], drafting: Model | None) -> None:
        threads = decision.budget.threads
        if threads == (0, 0):
            threads = self.loaded
        if not decision.crowded or self._fixed or decision.budget.objective == "energy":
            self._thread_search = None
            curve = self._curve(threads)
        else:
            if self._thread_search is None:
                self._thread_search = ThreadSearch(halves(self.loaded))
                self._crowd_curves = {}
            n = self._thread_search.threads
            threads, curve = (n, n), self._crowd_curve(n)
        if threads != self._model.threads:
            self._model.set_threads(*threads)
            if drafting is not None:
                drafting.set_threads(*threads)
        self._costs = curve
        for controller in controllers:
            controller.apply_budget(replace(decision.budget, threads=threads), curve)
        if not self._decisions or self._decisions[-1][0] != decision.mode:
            self._decisions.append((decision.mode, decision.reason))

    def _crowd_curve(self, threads: int) -> CostCurve:
        """Return a curve for passes next to other programs, whose effect on it is not saved."""
        if threads not in self._crowd_curves:
            self._crowd_curves[threads] = self._curves[self.loaded].copy()
        return self._crowd_curves[threads]

    def _curve(self, threads: tuple[int, int]) -> CostCurve:
        """Return the curve of any two counts, from those of equal ones."""
        if threads not in self._curves:
            known = calibration.known_curve(
                self._model.summary, calibration.with_threads(self._model, threads)
            )
            one, many = ((n, n) for n in threads)
            self._curves[threads] = known or self._curves[many].with_one_row_of(self._curves[one])
            self._curves[threads].undo = self.measured.undo
        return self._curves[threads]

    def _measure_threads(self) -> None:
        """Measure other thread counts and, when all are known, pass them to the governor."""
        counts = sorted(halves(self.loaded))
        missing = [n for n in counts if (n, n) not in self._curves]
        try:
            for n in missing[:1] if self.governor.mode == "auto" else missing:
                self._curves[n, n] = calibration.curve(self._sequence, self._note, (n, n))
        finally:
            self._model.set_threads(*self.loaded)
        if all((n, n) in self._curves for n in counts):
            uniform = {n: self._curves[n, n] for n in counts}
            self.governor.threads = {mode: best_threads(uniform, mode) for mode in LADDER[1:]}


def halves(threads: tuple[int, int]) -> list[int]:
    """Return both counts, half the larger one, a quarter, and so on to one, the largest first."""
    counts, most = {*threads}, max(threads)
    while most := most // 2:
        counts.add(most)
    return sorted(counts, reverse=True)
