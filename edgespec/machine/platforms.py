"""Sensor values that programs of Android and macOS print, run rarely and with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TERMUX = Path("/data/data/com.termux/files/usr")
NOTIFYUTIL = Path("/usr/bin/notifyutil")

_PRESSURE = "com.apple.system.thermalpressurelevel"
_PRESSURES = ("nominal", "fair", "serious", "critical", "critical")
_MOST_MILLIAMPERES = 10_000


class Seldom:
    """Calls `source` at most once in `every` seconds and repeats its result, or its error, in between."""

    def __init__(
        self,
        source: Callable[[], dict[str, object]],
        every: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._every, self._clock = source, every, clock
        self._asked: float | None = None
        self._answer: dict[str, object] | Exception = {}

    def __call__(self) -> dict[str, object]:
        now = self._clock()
        if self._asked is None or not 0 <= now - self._asked < self._every:
            self._asked = now
            try:
                self._answer = self._source()
            except Exception as error:  # noqa: BLE001 - any error is repeated
                self._answer = error
        if isinstance(self._answer, Exception):
            raise self._answer.with_traceback(None)  # else its traceback grows with every repetition
        return self._answer


def output(command: Sequence[str], seconds: float = 2.0) -> str:
    """Return what `command`, an absolute path and arguments, prints.

    Raises TimeoutError if it takes longer, after which it and its children have ended, and OSError if it
    cannot run or fails.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # A shell script's own children hold the pipe: killing only the shell would leave them running.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"{command[0]} took over {seconds:g} s") from None
    if process.returncode:
        raise OSError(f"{command[0]} ended with status {process.returncode}")
    return text.decode("utf-8", "replace")


def termux_battery(prefix: Path = TERMUX, seconds: float = 2.0) -> dict[str, object]:
    """Read the battery of an Android device through Termux:API. Raises LookupError without its program.

    The program is looked for only under Termux's own prefix.
    """
    program = prefix / "bin" / "termux-battery-status"
    if not os.access(program, os.X_OK):
        raise LookupError("termux-battery-status is missing: run `pkg install termux-api`")
    return parse_termux_battery(output([str(program)], seconds))


def parse_termux_battery(text: str) -> dict[str, object]:
    """Parse `charge`, `plugged` and, while discharging, `watts` from the JSON of termux-battery-status.

    `current` is specified in microamperes, yet some devices report milliamperes, and either sign occurs. No
    phone's battery delivers 10 A, and no device that computes draws less than 10 mA, which distinguishes the
    units. `voltage` is in millivolts; without it there are no watts. The temperature, a number or a string,
    is the battery's: it follows the processor's by minutes and is left out, so that on such a device the cost
    of a pass replaces the temperature. Raises ValueError on anything else.
    """
    report = json.loads(text)
    if not isinstance(report, dict) or "percentage" not in report:
        raise ValueError("termux-battery-status printed no battery")
    fields: dict[str, object] = {"charge": float(report["percentage"])}
    plugged = str(report.get("plugged", ""))
    if plugged.startswith(("PLUGGED", "UNPLUGGED")):
        fields["plugged"] = plugged.startswith("PLUGGED")
    current, voltage = report.get("current"), report.get("voltage")
    if current and voltage and plugged == "UNPLUGGED":
        amperes = abs(float(current))
        amperes *= 1e-3 if amperes < _MOST_MILLIAMPERES else 1e-6
        fields["watts"] = amperes * float(voltage) * 1e-3
    return fields


def mac_pressure(program: Path = NOTIFYUTIL, seconds: float = 2.0) -> dict[str, object]:
    """Read `pressure` of macOS: the level that the system publishes by notification, readable by any user."""
    if not os.access(program, os.X_OK):
        raise LookupError(f"{program} is missing")
    return parse_pressure(output([str(program), "-g", _PRESSURE], seconds))


def parse_pressure(text: str) -> dict[str, object]:
    """Parse `pressure`: a name and a level, from `notifyutil -g com.apple.system.thermalpressurelevel`.

    OSThermalNotification.h has the levels nominal 0, moderate 1, heavy 2, trapping 3 and sleeping 4. The
    processor is throttled from heavy on. Raises ValueError on any other text.
    """
    match = re.fullmatch(rf"{re.escape(_PRESSURE)}\s+([0-4])", text.strip())
    if match is None:
        raise ValueError(f"notifyutil printed {text.strip()[:60]!r}")
    return {"pressure": _PRESSURES[int(match[1])]}
