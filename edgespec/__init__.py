"""Edgespec: lossless speculative decoding that measures what a draft costs on this machine.

    from edgespec import load

    with load("qwen2.5-coder-1.5b") as model:
        for step in model.generate("Why is the sky blue?"):
            print(step.text, end="", flush=True)

This package decodes: pure logic over numpy arrays and Protocols. It knows no model runtime, no files and no
terminal; those are in `edgespec.models`, `edgespec.quant` and `edgespec.app`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgespec.app.engine.api import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the Python API when it is used: this is the only place that knows a package above its own."""
    if name == "load":
        from edgespec.app.engine.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
