"""Charts of results: speeds as bars, half an hour of heat as a curve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgespec.core import EdgespecError
from edgespec.extras import how_to_get
from edgespec.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SERIES = "to_reference"


def check(path: Path) -> None:
    """Raise EdgespecError if `draw` could not write `path`; to be called before a long run."""
    if path.suffix.lower() != ".png":
        raise EdgespecError(f"--chart writes PNG files: name one, as in {path.stem or 'chart'}.png")
    if not path.parent.is_dir():
        raise EdgespecError(f"--chart: no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise EdgespecError(f"--chart: no permission to write to {path.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise EdgespecError(f"--chart needs matplotlib: {how_to_get('dev')}") from None


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write grouped bars of the median ratios as a PNG, with the quartiles as error bars.

    One group per task and one for all; the reference is the line at 1. A system without a figure for a task
    has no bar there. Raises EdgespecError if the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    groups = [*report["tasks"].items(), ("all", report["overall"])]
    systems = [name for name in report["overall"] if name != report["reference"]]
    width = 0.84 / max(len(systems), 1)
    figure = Figure(
        figsize=(max(8.0, 0.24 * len(groups) * (len(systems) + 1) + 2.5), 5.2), layout="constrained"
    )
    axes = figure.add_subplot()
    for i, name in enumerate(systems):
        found = [(x, row[name][_SERIES]) for x, (_, row) in enumerate(groups) if row[name][_SERIES]]
        offset = (i - (len(systems) - 1) / 2) * width
        axes.bar(
            [x + offset for x, _ in found],
            [one["median"] for _, one in found],
            width,
            # Overall, the geometric mean over tasks may lie outside the quartiles of all turns.
            yerr=[
                [max(0.0, one["median"] - one["low"]) for _, one in found],
                [max(0.0, one["high"] - one["median"]) for _, one in found],
            ],
            error_kw={"elinewidth": 0.8, "capsize": 2},
            label=name,
            color=f"C{i % 10}",
        )
    axes.axhline(1.0, color="black", linewidth=1, label=report["reference"])
    axes.set_xticks(range(len(groups)), [task for task, _ in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel(f"speed relative to {report['reference']}")
    draft = f", draft {report['draft']}" if report["draft"] else ""
    axes.set_title(
        f"{report['model']}{draft}, threads {report['threads'][0]}, median and quartiles", fontsize="medium"
    )
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    _write(figure, path)


def draw_heat(report: Mapping[str, Any], path: Path) -> None:
    """Write the temperatures of a simulated half hour as a PNG: `auto` and fixed `performance`.

    Raises EdgespecError if the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in ("performance", "auto"):
        celsius = report[name]["celsius"]
        speed = report[name]["tokens_per_second"]
        axes.plot([i / 60 for i in range(len(celsius))], celsius, label=f"{name}, {speed:.1f} tokens/s")
    best = report["best_fixed"]
    axes.axhline(report["limit"], color="black", linewidth=1, label=f"limit {report['limit']:.0f} °C")
    axes.set_xlabel("minutes")
    axes.set_ylabel("°C")
    axes.set_title(
        f"Simulated heat: auto has {report['share_of_best_fixed']:.0%} of the best fixed setting's speed "
        f"({best['mode']}, resting {best['rest']:.0%})",
        fontsize="medium",
    )
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(fontsize="small", frameon=False)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all."""
    try:
        with replacing(path, 0o666) as file:
            figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise EdgespecError(f"cannot write {path}: {error.strerror}") from None
