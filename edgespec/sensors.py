"""What the machine says of itself. The only file that imports psutil."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

import psutil


def compute_cores() -> int:
    """Cores worth a compute thread: physical ones, as far as this process may use them."""
    allowed = logical_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def logical_cores() -> int:
    """Threads that run at once, as far as this process may use them: two a core where cores share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor as the system names it, with its count of cores: for keys, not for people."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
            lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
            fields = {key.strip(): value.strip() for key, value in lines.items()}
            name = " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    return f"{name} x{os.cpu_count()}"


def load_average() -> float:
    """Threads that ran or waited for a processor over the last minute, 0.0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def memory_available() -> int:
    """Bytes a program can take without making the machine swap."""
    return int(psutil.virtual_memory().available)


def peak_memory() -> int | None:
    """The most memory this process ever held, in bytes, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return None if peak is None else int(peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def process_memory(pid: int) -> int | None:
    """The resident memory of another process in bytes, None if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None
