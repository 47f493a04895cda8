"""What an installation can be given later, and the program that runs without Python cannot."""

from __future__ import annotations

from edgespec.processes import program_folder


def how_to_get(extra: str, then: str = "") -> str:
    """What to do where packages of edgespec[extra] are missing; `then` is said of pip alone."""
    if program_folder() is not None:
        return "this program takes in no packages, an installation by pip does: see its README"
    return f"pip install 'edgespec[{extra}]'{then}"
