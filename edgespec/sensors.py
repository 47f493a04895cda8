"""What the machine says of itself. The only file that imports psutil."""

from __future__ import annotations

import os

import psutil


def compute_cores() -> int:
    """Cores worth a compute thread: physical ones, as far as this process may use them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def memory_available() -> int:
    """Bytes a program can take without making the machine swap."""
    return int(psutil.virtual_memory().available)
