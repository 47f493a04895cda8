"""What Android and macOS tell through programs of theirs, run seldom and never for long."""

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
    """Asks `source` once in `every` seconds and repeats its answer, or its error, in between."""

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
            except Exception as error:  # noqa: BLE001 - whatever it is, it is repeated
                self._answer = error
        if isinstance(self._answer, Exception):
            raise self._answer.with_traceback(None)  # else it grows with every repetition
        return self._answer


def output(command: Sequence[str], seconds: float = 2.0) -> str:
    """What `command`, an absolute path and arguments, prints.

    Raises TimeoutError when it takes longer, after which it and all it started are gone, and OSError when it
    cannot be run or fails.
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
            # A shell script's own children hold the pipe: to end the shell alone would leave them.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"{command[0]} took over {seconds:g} s") from None
    if process.returncode:
        raise OSError(f"{command[0]} ended with status {process.returncode}")
    return text.decode("utf-8", "replace")


def termux_battery(prefix: Path = TERMUX, seconds: float = 2.0) -> dict[str, object]:
    """Battery of an Android device through Termux:API. LookupError where Termux has no such program.

    The program is looked for under Termux' own prefix and nowhere else.
    """
    program = prefix / "bin" / "termux-battery-status"
    if not os.access(program, os.X_OK):
        raise LookupError("there is no termux-battery-status: `pkg install termux-api`")
    return parse_termux_battery(output([str(program)], seconds))


def parse_termux_battery(text: str) -> dict[str, object]:
    """`charge`, `plugged` and, while discharging, `watts` of the JSON that termux-battery-status prints.

    `current` is meant to be in microamperes, yet some devices fill in milliamperes, and either sign occurs.
    No phone's battery gives 10 A, and none that computes gives less than 10 mA, which tells the units
    apart. `voltage` is in millivolts; without it there are no watts. The temperature it prints, number or
    string, is the battery's: it follows the processor's by minutes and is left out, so that on such a
    device the cost of a pass is the thermometer. Raises ValueError on anything else than such an object.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or "percentage" not in told:
        raise ValueError("termux-battery-status printed no battery")
    fields: dict[str, object] = {"charge": float(told["percentage"])}
    plugged = str(told.get("plugged", ""))
    if plugged.startswith(("PLUGGED", "UNPLUGGED")):
        fields["plugged"] = plugged.startswith("PLUGGED")
    current, voltage = told.get("current"), told.get("voltage")
    if current and voltage and plugged == "UNPLUGGED":
        amperes = abs(float(current))
        amperes *= 1e-3 if amperes < _MOST_MILLIAMPERES else 1e-6
        fields["watts"] = amperes * float(voltage) * 1e-3
    return fields


def mac_pressure(program: Path = NOTIFYUTIL, seconds: float = 2.0) -> dict[str, object]:
    """`pressure` of macOS: the level the system publishes by notification, readable by any user."""
    if not os.access(program, os.X_OK):
        raise LookupError(f"there is no {program}")
    return parse_pressure(output([str(program), "-g", _PRESSURE], seconds))


def parse_pressure(text: str) -> dict[str, object]:
    """`pressure` of what `notifyutil -g com.apple.system.thermalpressurelevel` prints: its name and a level.

    OSThermalNotification.h has the levels nominal 0, moderate 1, heavy 2, trapping 3 and sleeping 4. Heavy
    is where the processor is slowed down. Raises ValueError on any other text.
    """
    match = re.fullmatch(rf"{re.escape(_PRESSURE)}\s+([0-4])", text.strip())
    if match is None:
        raise ValueError(f"notifyutil printed {text.strip()[:60]!r}")
    return {"pressure": _PRESSURES[int(match[1])]}
