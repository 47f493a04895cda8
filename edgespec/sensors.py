"""What the machine says of itself. The only file that imports psutil."""

from __future__ import annotations

import os
import sys

import psutil


def compute_cores() -> int:
    """Cores worth a compute thread: physical ones, as far as this process may use them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


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
