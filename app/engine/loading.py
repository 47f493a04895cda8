"""Load an engine from names and options: find the files and choose the settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from edgespec.app import settings
from edgespec.app.option_table import KvType
from edgespec.core import EdgespecError
from edgespec.machine.governor import Mode
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.references import load_references
from edgespec.models.hub.selection import default_model
from edgespec.models.hub.store import installed, is_onnx, resolve

if TYPE_CHECKING:
    from edgespec.app.engine.engine import Engine
    from edgespec.models.options import Options

BackendChoice = Literal["auto", "llama.cpp", "ik"]
_CONTEXT, _LEAST_CONTEXT = 4096, 1024  # tokens, where none are asked for: usually, and where memory is short


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine to load, as given by the options of commands (`app.option_table` describes each).

    `mode` None is that of the settings, `context` None 4096 or, where memory is short, fewer. `parallel` is
    the number of requests generated at the same time.
    """

    model: str = ""
    draft: str = "auto"
    max_draft: int = 31
    exact: bool = False
    context: int | None = None
    kv_type: KvType = "f16"
    threads: int = 0
    engine: BackendChoice = "auto"
    mode: Mode | None = None
    parallel: int = 1
    lora: list[str] = field(default_factory=list)


def load_engine(spec: EngineSpec, progress: Callable[[float], bool] | None = None) -> Engine:
    """Resolve names and load, with the settings that `edgespec tune` found where `spec` leaves them open.

    `progress` receives the share of the work that is done; returning False stops it. Raises EdgespecError for
    anything the user can fix.
    """
    from edgespec.app.engine.assembly import open_engine  # llama.cpp is loaded only where it is used
    from edgespec.models.gguf.heads import head_for

    if spec.exact and spec.engine == "ik":
        raise EdgespecError("--exact needs llama.cpp: leave out --engine ik")
    if spec.lora and spec.engine == "ik":
        raise EdgespecError("--lora needs llama.cpp: leave out --engine ik")
    name = spec.model or default_model()
    target = resolve(name)
    if spec.lora and is_onnx(target):
        raise EdgespecError(f"{target.name} is an ONNX model, which has no adapters here: leave out --lora")
    small: Path | None = None
    if spec.draft == "auto":
        small = partner(name)
    elif spec.draft not in ("none", "suffix"):
        small = resolve(spec.draft)
    notes: list[str] = []
    options, form = _tuned(target, "llama.cpp" if spec.lora else spec.engine, progress, notes.append)
    if spec.draft == "auto" and not is_onnx(target):
        head = head_for(target, options.engine)
        small = small if small and head == target else head or small  # one in the same file reads all tokens
    options = _as_asked(target, options, spec, notes.append)
    loaded = open_engine(
        target,
        small and form_of(small, form),
        suffix=spec.draft != "none",
        max_draft=0 if spec.draft == "none" else spec.max_draft,
        mode=spec.mode or settings.load().mode,
        exact=spec.exact,
        parallel=spec.parallel,
        options=options,
        progress=progress,
    )
    loaded.notes += notes
    return loaded


def partner(name: str) -> Path | None:
    """Return the draft model that the catalog names for a model, None if it is not installed.

    For an ONNX folder named after a catalog entry it is the draft model's folder, preferably with the same
    weights, or its file.
    """
    if reference := load_references().get(name):
        try:
            return resolve(reference.draft) if reference.draft else None
        except EdgespecError:
            return None
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


def _as_asked(target: Path, options: Options, spec: EngineSpec, note: Callable[[str], None]) -> Options:
    """Return `options` with context, threads, cache and adapters of `spec`."""
    from edgespec.models.gguf.check import check_gguf
    from edgespec.models.gguf.footprint import has_small_cache
    from edgespec.models.gguf.lora import parse_adapter
    from edgespec.models.gguf.native import LlamaOptions

    if spec.context is None:
        options = replace(options, context=_CONTEXT, least_context=_LEAST_CONTEXT)
    else:
        options = replace(options, context=spec.context)
    if spec.threads:
        options = options.with_threads(spec.threads, spec.threads)
    if not isinstance(options, LlamaOptions):
        if spec.kv_type == "q8_0":
            note(f"the KV cache of {target.name} has the type of its graph: --kv-type is not used")
        return options
    adapters = tuple(map(parse_adapter, spec.lora))
    options = replace(options, adapters=adapters, auto_cache=spec.kv_type == "auto")
    if spec.kv_type != "q8_0":
        return options
    if options.engine == "ik" and not has_small_cache(check_gguf(target), "ik"):
        if spec.engine == "ik":
            raise EdgespecError(f"ik has no q8_0 cache for {target.name}: leave out --engine ik")
        options = replace(options, engine="llama.cpp")
    return options.with_cache("q8_0")


def _tuned(
    target: Path, engine: BackendChoice, progress: Callable[[float], bool] | None, note: Callable[[str], None]
) -> tuple[Options, str]:
    """Return the tuned settings of `target` if they are for `engine`, and its draft model's file name."""
    from edgespec.app.engine import calibration, first_use
    from edgespec.models.gguf.backends import library
    from edgespec.models.gguf.check import check_gguf
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.models.onnx.check import check_onnx
    from edgespec.models.onnx.model import OnnxOptions

    if is_onnx(target):
        if engine != "auto":
            raise EdgespecError(f"{target.name} is an ONNX model, which onnxruntime runs: leave out --engine")
        return OnnxOptions(providers=calibration.providers(check_onnx(target))), ""
    summary = check_gguf(target)
    engine = _preferred() if engine == "auto" else engine
    found = calibration.tuned(summary)
    fits = found is not None and engine in ("auto", found[0].engine)
    if found is not None and fits and library(found[0].engine).refusal_of_file(summary) is None:
        return found
    if engine == "auto":
        return first_use.choose_engine(target, summary, progress, note) or LlamaOptions(), ""
    return LlamaOptions(engine=engine), ""


def _preferred() -> BackendChoice:
    """Return the runtime that EDGESPEC_ENGINE names. Raises EdgespecError for an unknown one."""
    name = os.environ.get("EDGESPEC_ENGINE") or "auto"
    if name not in get_args(BackendChoice):
        valid = ", ".join(get_args(BackendChoice))
        raise EdgespecError(f"unknown EDGESPEC_ENGINE {name!r} (valid: {valid})")
    return cast(BackendChoice, name)


def form_of(draft: Path, wanted: str) -> Path:
    """Return the file made from `draft` that was measured as fastest, else any made from it, else `draft`."""
    from edgespec.quant.tune import draft_forms, onnx_forms

    if is_onnx(draft):
        return draft
    forms = draft_forms(draft)
    return next((form for form in [*forms, *onnx_forms(draft)] if form.name == wanted), forms[:2][-1])
