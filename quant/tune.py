"""The fastest settings of a model on this machine among those that change nothing in what it computes.

Settings are tried in turn, each against the best so far: all their products would take an hour and differ
little. Machines drift by tens of percent within minutes, so settings are timed side by side, round by round,
and only the medians of their ratios count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from edgespec.core import Cancelled, EdgespecError, NamedProgress
from edgespec.costs import CostCurve
from edgespec.machine.sensors import compute_cores, logical_cores
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.native import BackendName, LlamaOptions
from edgespec.models.gguf.selftest import settle
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.store import is_onnx
from edgespec.models.runtime import options_for
from edgespec.planner import best_case
from edgespec.quant.requant import SOURCE_KEY, fingerprint, made_drafts
from edgespec.quant.timing import PROMPT, Candidate, Figures, TimingBench, TimingBudget, scaled, undisturbed

MARGIN = 1.02
"""How many times better a setting must be to replace a simpler one."""

_ACCEPTED = 0.8  # the acceptance rate of draft tokens in the score
_PLAIN, _CHECKING, _READING = 0.5, 0.35, 0.15
_NEVER = "never chosen: it changes what the model computes"

FULL = TimingBudget((1, 2, 4, 8, 16), 256, 6.0, prompts=4, least=6, most=16, seconds=20.0, repeats=2)
FIRST = TimingBudget((1, 4, 8), 48, 0.5, prompts=2, least=2, most=4, seconds=1.5, repeats=1)
QUICK = TimingBudget((1, 4, 8), 64, 1.0, prompts=2, least=4, most=8, seconds=4.0, repeats=1)


@dataclass(frozen=True, slots=True)
class SettingTrial:
    """One setting. `score` is relative to the first that ran; `outcome` is its result, with the reason.

    `figures` are the first one's, undisturbed, times the ratios measured since, so that they compare however
    the machine drifted. Without them it was not measured.
    """

    setting: str
    options: LlamaOptions
    outcome: str
    figures: Figures | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class DraftForm:
    """A draft as shipped, or one made from it; `seconds` a token, one row, None where it was not measured.

    `best_case`: the target's speed, in plain decoding speeds, if nine of ten draft tokens were accepted.
    """

    path: Path
    outcome: str
    seconds: float | None = None
    best_case: float = 0.0


@dataclass(frozen=True, slots=True)
class TuneReport:
    """All that was tried. `best` is one of the trials, `draft` one of the forms, None without any."""

    path: Path
    trials: tuple[SettingTrial, ...]
    best: SettingTrial
    forms: tuple[DraftForm, ...] = ()
    draft: DraftForm | None = None

    @property
    def start(self) -> SettingTrial:
        """The first setting that ran, to which scores are relative."""
        return next(one for one in self.trials if one.figures is not None)


def tune(
    path: Path, draft: Path | None = None, *, quick: bool = False, progress: NamedProgress | None = None
) -> TuneReport:
    """Find the best settings for the model in `path`, and the fastest form of its `draft`; keep nothing.

    Takes minutes; `quick` takes less than one for a gigabyte of weights, and leaves out what rarely matters.
    Raises EdgespecError when no engine here runs the model, Cancelled when `progress` stopped it.
    """
    effort = QUICK if quick else FULL
    steps = 4 if quick else 6
    with TimingBench(effort, steps + (draft is not None), progress or (lambda *_: True)) as bench:
        search = _Search(path, bench)
        search.compare({name: _first(path, name) for name in get_args(BackendName)}, bench.all)
        search.compare(_one_row_threads(search.options), (1,))
        search.compare(_many_row_threads(search.options), [n for n in bench.all if n != 1])
        if search.options.repack:
            search.compare({"weights not repacked": replace(search.options, repack=False)}, bench.all)
        if not quick:
            search.compare({"no flash attention": replace(search.options, flash_attention=False)}, bench.all)
            # Without flash attention the engines have no 8-bit values.
            small = replace(search.options, flash_attention=True, type_k="q8_0", type_v="q8_0")
            search.compare({"8-bit cache": small}, bench.all, never=_NEVER)
        best = search.best
        forms = [] if draft is None else _compare_forms(bench, draft, best)
    chosen = next((form for form in forms if form.outcome == "chosen"), None)
    return TuneReport(path, tuple(search.trials), best, tuple(forms), chosen)


def compare_engines(path: Path, progress: NamedProgress) -> TuneReport:
    """The engines on the model in `path`, and thread counts of the faster, as far as `progress` allows.

    Raises EdgespecError when no engine here runs the model, Cancelled when `progress` stopped it before the
    engines were compared.
    """
    with TimingBench(FIRST, 3, progress) as bench:
        search = _Search(path, bench)
        search.compare(
            {name: LlamaOptions(context=512, engine=name) for name in get_args(BackendName)}, bench.all
        )
        with suppress(Cancelled):
            search.compare(_one_row_threads(search.options), (1,))
            search.compare(_many_row_threads(search.options), [n for n in bench.all if n != 1])
        return TuneReport(path, tuple(search.trials), search.best)


def score(figures: Figures) -> float:
    """Speed in one number that compares with another of the same model.

    The weighted geometric mean of plain decoding 1 / t(1), of verifying drafts, which is the best of
    E(n) / t(n) where each draft token is accepted with 0.8, and of prefill in tokens per second.
    """
    rows = {n: seconds for n, seconds in figures.items() if n != PROMPT}
    checking = max((1 - _ACCEPTED**n) / (1 - _ACCEPTED) / seconds for n, seconds in rows.items())
    return float(rows[1] ** -_PLAIN * checking**_CHECKING * figures[PROMPT] ** -_READING)


def choose(best: float, scores: Sequence[float]) -> int | None:
    """Which of `scores` replaces the `best`: the highest, if it is better by more than MARGIN."""
    if not scores or max(scores) <= best * MARGIN:
        return None
    return scores.index(max(scores))


def thread_counts() -> list[int]:
    """Counts worth a try: from a quarter of the physical cores to all, and the logical ones if more."""
    cores = compute_cores()
    some = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
    return sorted({n for n in some if cores / 4 <= n < cores} | {cores, logical_cores()})


def draft_forms(source: Path) -> list[Path]:
    """`source` and the drafts made of exactly this file. Damaged ones do not count."""
    forms = [source]
    for path in made_drafts(source):
        with suppress(EdgespecError, OSError):
            if check_gguf(path).metadata.get(SOURCE_KEY) == fingerprint(source):
                forms.append(path)
    return forms


def onnx_forms(source: Path) -> list[Path]:
    """Return ONNX folders next to `source` with its name; they are checked when they are loaded."""
    names = [source.stem, *(one.name for one in load_catalog().values() if one.file == source.name)]
    others = [path for path in source.parent.iterdir() if is_onnx(path)] if source.parent.is_dir() else []
    return sorted(path for path in others if any(path.name.startswith(f"{name}-") for name in names))


class _Search:
    """A greedy search over the settings of one model: every comparison may replace the best."""

    best: SettingTrial

    def __init__(self, path: Path, bench: TimingBench) -> None:
        self._path, self._bench = path, bench
        self.trials: list[SettingTrial] = []

    @property
    def options(self) -> LlamaOptions:
        return self.best.options

    def compare(
        self, settings: Mapping[str, LlamaOptions], quantities: Sequence[int], never: str = ""
    ) -> None:
        """Measure `settings` against the best so far; without one, the first that runs becomes it.

        `never` is why none of them may be chosen. Raises EdgespecError when there is no best in the end.
        """
        first = not self.trials
        variants = {} if first else {self.best.setting: self._variant(self.options)}
        errors: dict[str, EdgespecError] = {}
        for setting, options in settings.items():
            try:
                self._bench.open(self._variant(options), setting)
                variants[setting] = self._variant(options)
            except EdgespecError as error:
                errors[setting] = error
        if not variants:
            raise next(iter(errors.values()))
        best, *others = self._bench.race(variants, quantities) if first or len(variants) > 1 else [[]]
        name, *rivals = variants
        if first:
            self.best = SettingTrial(name, settings[name], "where it starts", undisturbed(best), 1.0)
            self.trials.append(self.best)
        rated = [(setting, settings[setting]) for setting in rivals]
        self.trials += judged(self.best, rated, best, others, never)
        self.trials += [
            SettingTrial(name, settings[name], f"not measured: {why}") for name, why in errors.items()
        ]
        self.best = next((one for one in reversed(self.trials) if one.outcome == "chosen"), self.best)
        self._bench.close(but=self._variant(self.options))

    def _variant(self, options: LlamaOptions) -> Candidate:
        return Candidate(self._path, options)


def judged(
    best: SettingTrial,
    others: Sequence[tuple[str, LlamaOptions]],
    before: Sequence[Figures],
    rounds: Sequence[Sequence[Figures]],
    never: str = "",
) -> list[SettingTrial]:
    """Compare `rounds` of `others` with the rounds `before` of the best, which were interleaved.

    At most one outcome is "chosen", none with a reason for `never`. The median of ratios can be another
    program's doing, and so can the quickest rounds: the winner wins by both.
    """
    assert best.figures is not None
    assert best.score is not None
    reached = score(best.figures)
    figures = [scaled(best.figures, before, one) for one in rounds]
    ratios = [score(one) / reached for one in figures]
    quickest = [score(scaled(best.figures, before, one, quickest=True)) / reached for one in rounds]
    sure = [min(both) for both in zip(ratios, quickest, strict=True)]
    winner = choose(1.0, sure)
    trials = []
    for i, (setting, options) in enumerate(others):
        outcome = never or ("chosen" if i == winner else _why_not(ratios[i], sure[i]))
        trials.append(SettingTrial(setting, options, outcome, figures[i], best.score * ratios[i]))
    return trials


def _why_not(ratio: float, sure: float) -> str:
    if sure > MARGIN:
        return "faster, another even more"
    if ratio > MARGIN:
        return "unclear: not faster undisturbed"
    return "slower" if ratio < 1 / MARGIN else f"no gain above {MARGIN - 1:.0%}"


def _compare_forms(bench: TimingBench, source: Path, target: SettingTrial) -> list[DraftForm]:
    """Time the forms of a draft on the target's engine; the fastest is chosen."""
    forms: list[DraftForm] = []
    variants: dict[str, Candidate] = {}
    bench.close()
    for path in [*draft_forms(source), *onnx_forms(source)]:
        variant = Candidate(path, options_for(path, replace(target.options, max_rows=1)))
        try:
            bench.open(variant, path.name, source)
            variants[path.name] = variant
        except EdgespecError as error:
            forms.append(DraftForm(path, f"not measured: {error}"))
    if not variants:
        return forms
    rounds = bench.race(variants, (1,))
    base = undisturbed(rounds[0])
    seconds = [scaled(base, rounds[0], one)[1] for one in rounds]
    quickest = [scaled(base, rounds[0], one, quickest=True)[1] for one in rounds]
    winner = choose(1.0, [base[1] / max(both) for both in zip(seconds, quickest, strict=True)]) or 0
    assert target.figures is not None
    costs = CostCurve({n: one for n, one in target.figures.items() if n != PROMPT})
    for i, variant in enumerate(variants.values()):
        outcome = "chosen" if i == winner else "slower" if i else "a made form is faster"
        forms.append(
            DraftForm(variant.path, outcome, seconds[i], best_case(costs, CostCurve({1: seconds[i]})))
        )
    return forms


def _first(path: Path, engine: BackendName) -> LlamaOptions:
    """What an engine is compared with others in: without what it was seen to fail in."""
    options = LlamaOptions(context=512, engine=engine)
    with suppress(EdgespecError):  # it is not installed, or always fails: `compare` reports that
        return settle(path, options, engines=[engine])
    return options


def _one_row_threads(best: LlamaOptions) -> dict[str, LlamaOptions]:
    now = best.threads or compute_cores()
    return {
        f"{_threads(n)} for one row": replace(best, threads=n, threads_batch=best.threads_batch or now)
        for n in thread_counts()
        if n != now
    }


def _many_row_threads(best: LlamaOptions) -> dict[str, LlamaOptions]:
    now = best.threads_batch or best.threads or compute_cores()
    return {
        f"{_threads(n)} for many rows": replace(best, threads_batch=n) for n in thread_counts() if n != now
    }


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"
