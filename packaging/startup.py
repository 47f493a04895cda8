"""Measure start-up times of the program and of the source install: packaging/startup.py PROGRAM [PROGRAM...]

Prints medians in seconds of interleaved runs: `--version`; the chat's first screen; the first token of a
small model since the launch. The machine should be idle; each is run once before, so that files are cached.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import monotonic

ROUNDS = 5
SOURCE = [sys.executable, "-m", "edgespec.app.cli.main"]
ANSWER = ["run", "Name three colours.", "-m", "smollm2-135m", "--max-tokens", "4", "--draft", "none"]


def version(command: Sequence[str]) -> float:
    start = monotonic()
    subprocess.run([*command, "--version"], check=True, stdout=subprocess.DEVNULL)
    return monotonic() - start


def until(command: Sequence[str], seen: bytes) -> float:
    """Return the seconds until the program writes `seen` (if empty, anything) to its terminal."""
    start = monotonic()
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], list(command))
    output = b""
    while not output or seen not in output:
        if not select.select([fd], [], [], 120)[0]:
            sys.exit(f"edgespec: {' '.join(command)} does not print {seen!r}")
        output += os.read(fd, 65536)
    seconds = monotonic() - start
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(fd)
    return seconds


MEASURES: dict[str, Callable[[Sequence[str]], float]] = {
    "--version": version,
    "first screen": lambda command: until([*command, "chat", "-m", "smollm2-135m"], b"sends"),
    "first token": lambda command: until([*command, *ANSWER], b""),
}


def main() -> None:
    ways: dict[str, list[str]] = {"source": SOURCE} | {name: [name] for name in sys.argv[1:]}
    for name, measure in MEASURES.items():
        for command in ways.values():
            measure(command)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, command in ways.items():
                found[way].append(measure(command))
        for way, seconds in found.items():
            print(f"{name:<12}  {median(seconds):5.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})  {way}")


if __name__ == "__main__":
    main()
