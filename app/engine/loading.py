"""From names and options to an engine: which files, and with which settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from edgespec.app import settings
from edgespec.core import EdgespecError
from edgespec.machine.governor import Mode
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.selection import default_model
from edgespec.models.hub.store import installed, is_onnx, resolve

if TYPE_CHECKING:
    from edgespec.app.engine.engine import Engine
    from edgespec.models.options import Options

BackendChoice = Literal["auto", "llama.cpp", "ik"]


def load_engine(
    model: str,
    draft: str,
    max_draft: int,
    context: int,
    threads: int,
    progress: Callable[[float], bool] | None = None,
    engine: BackendChoice = "auto",
    exact: bool = False,
    mode: Mode | None = None,
    parallel: int = 1,
) -> Engine:
    """Resolve names and load, with the settings `edgespec tune` found where none are given here.

    Raises EdgespecError for anything the user can mend.
    """
    from edgespec.app.engine.assembly import open_engine  # llama.cpp is loaded only where it is used

    if exact and engine == "ik":
        raise EdgespecError("--exact needs llama.cpp: leave out --engine ik.")
    name = model or default_model()
    target = resolve(name)
    small: Path | None = None
    if draft == "auto":
        small = partner(name)
    elif draft not in ("none", "suffix"):
        small = resolve(draft)
    notes: list[str] = []
    options, form = _tuned(target, engine, progress, notes.append)
    options = replace(options, context=context)
    if threads:
        options = options.with_threads(threads, threads)
    loaded = open_engine(
        target,
        small and form_of(small, form),
        suffix=draft != "none",
        max_draft=0 if draft == "none" else max_draft,
        mode=mode or settings.load().mode,
        exact=exact,
        parallel=parallel,
        options=options,
        progress=progress,
    )
    loaded.notes += notes
    return loaded


def partner(name: str) -> Path | None:
    """The draft that the catalogue names for a model, if it is on this machine.

    For an ONNX folder that is named after an entry it is the draft's folder, the same weights first, or file.
    """
    catalog, here = load_catalog(), installed()
    folder = Path(name).name if name not in catalog else ""
    entry = catalog.get(name) or next((e for e in catalog.values() if folder.startswith(f"{e.name}-")), None)
    wanted = entry.draft if entry is not None else None
    if entry is None or wanted is None:
        return None
    files = [one.path for one in here if one.entry is not None and one.entry.name == wanted]
    if folder:
        names = [one.path for one in here if one.entry is None and one.path.name.startswith(f"{wanted}-")]
        folders = [path for path in names if is_onnx(path)]
        alike = f"{wanted}{folder.removeprefix(entry.name)}"
        files = [*sorted(folders, key=lambda path: path.name != alike), *files]
    return next(iter(files), None)


def _tuned(
    target: Path, engine: BackendChoice, progress: Callable[[float], bool] | None, note: Callable[[str], None]
) -> tuple[Options, str]:
    """The settings found for `target` if they are for `engine`, and its draft's form."""
    from edgespec.app.engine import calibration, first_use
    from edgespec.models.gguf.check import check_gguf
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.models.onnx.check import check_onnx
    from edgespec.models.onnx.model import OnnxOptions

    if is_onnx(target):
        if engine != "auto":
            raise EdgespecError(
                f"{target.name} is an ONNX model, which onnxruntime runs: leave out --engine."
            )
        return OnnxOptions(providers=calibration.providers(check_onnx(target))), ""
    summary = check_gguf(target)
    engine = _preferred() if engine == "auto" else engine
    found = calibration.tuned(summary)
    if found is not None and engine in ("auto", found[0].engine):
        return found
    if engine == "auto":
        return first_use.choose_engine(target, summary, progress, note) or LlamaOptions(), ""
    return LlamaOptions(engine=engine), ""


def _preferred() -> BackendChoice:
    """The engine that the environment names. Raises EdgespecError for one that there is not."""
    name = os.environ.get("EDGESPEC_ENGINE") or "auto"
    if name not in get_args(BackendChoice):
        known = ", ".join(get_args(BackendChoice))
        raise EdgespecError(f"EDGESPEC_ENGINE is {name!r}: set it to one of {known}.")
    return cast(BackendChoice, name)


def form_of(draft: Path, wanted: str) -> Path:
    """The form of `draft` that was found fastest, else the one made of it, else itself."""
    from edgespec.quant.tune import draft_forms, onnx_forms

    if is_onnx(draft):
        return draft
    forms = draft_forms(draft)
    return next((form for form in [*forms, *onnx_forms(draft)] if form.name == wanted), forms[:2][-1])
