"""The first use of a model compares the installed engines, and the faster is used from then on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgespec.app.console import bar, stopped_by_ctrl_c
from edgespec.app.engine import calibration
from edgespec.core import Cancelled, EdgespecError
from edgespec.machine.sensors import ProcessorLoad

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgespec.core import NamedProgress
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.models.runtime import Summary
    from edgespec.quant.tune import TuneReport

LIMIT = 15.0  # seconds
_BUSY = 0.25  # share of the cores that other programs use, above which engines are not compared
_LOOK = 0.25  # seconds in which that is measured


def choose_engine(
    path: Path, summary: Summary, progress: Callable[[float], bool] | None, note: Callable[[str], None]
) -> LlamaOptions | None:
    """Compare the engines on the file at `path`, once, and save the faster. None if they were not compared.

    Takes at most 15 s. `progress` as for loading a model, None: a bar on the terminal, where Ctrl-C ends only
    the comparison. `note` gets the outcome.
    """
    from edgespec.quant import tune as tuning

    if find_spec("ik_llama_cpp") is None:
        return None
    if busy := _others():
        note(f"other programs use {busy:.0%} of the processor: the engines are compared at a later start")
        return None
    if not calibration.first_time(f"first-{calibration.tuned_key(summary)}"):
        return None
    end = time.monotonic() + LIMIT
    shown: AbstractContextManager[NamedProgress] = (
        nullcontext(lambda _, fraction: progress(fraction)) if progress is not None else _on_terminal(path)
    )
    try:
        with shown as show:
            report = tuning.compare_engines(
                path, lambda what, fraction: show(what, fraction) and time.monotonic() < end
            )
    except Cancelled:
        note("the engines were not compared: run `edgespec tune`, which compares more settings, too")
        return None
    except EdgespecError:  # errors of the file or the engines are reported when it is loaded
        return None
    options = report.best.options
    calibration.keep_tuned(summary, options, "")
    note(_outcome(report))
    return options


def _others() -> float:
    """Return the share of the cores that other programs use, 0 if it is small."""
    load = ProcessorLoad()
    time.sleep(_LOOK)
    share = load().get("others", 0.0)
    return share if share > _BUSY else 0.0


@contextmanager
def _on_terminal(path: Path) -> Iterator[NamedProgress]:
    with bar(f"comparing engines on {path.name}") as show, stopped_by_ctrl_c(show) as stoppable:
        yield stoppable


def _outcome(report: TuneReport) -> str:
    engines = [one for one in report.trials if one.setting in ("llama.cpp", "ik")]
    scores = sorted(((one.score, one.setting) for one in engines if one.score is not None), reverse=True)
    used = report.best.options.engine
    if len(scores) < 2:
        return f"using the engine {used}: the other does not run this model on this machine"
    share = scores[0][0] / scores[1][0]
    return (
        f"using the engine {used} from now on: {scores[0][1]} is {share:.2f} times as fast as "
        f"{scores[1][1]} on this machine (`edgespec tune` compares more settings)"
    )
