"""Install hints for optional packages; the standalone program cannot load any."""

from __future__ import annotations

from edgespec.processes import program_folder


def how_to_get(extra: str, then: str = "") -> str:
    """Return how to install the packages of edgespec[extra]; `then` is appended to the pip command."""
    if program_folder() is not None:
        return "the standalone program cannot load packages: install Edgespec with pip (see its README)"
    return f"pip install 'edgespec[{extra}]'{then}"
