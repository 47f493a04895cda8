"""ONNX folders made of GGUF files and of checkpoints: all that is decided before and after `exporter` works.

The libraries that convert are large and optional, and take more memory than they give back: they run in a
process of their own, which writes into a folder next to the destination. The destination appears
complete or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgespec import processes
from edgespec.core import EdgespecError, NamedProgress
from edgespec.extras import how_to_get
from edgespec.machine.sensors import memory_available
from edgespec.models.gguf.check import check_gguf
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.download import offline_requested
from edgespec.models.hub.store import is_onnx, resolve
from edgespec.models.onnx.check import check_onnx
from edgespec.quant.exporter import MODEL, PROGRESS
from edgespec.quant.requant import require_space, unwritable, work_folder
from edgespec.text import printable

Bits = Literal[4, 8]
EXTRA = ("torch", "transformers", "accelerate", "onnx", "onnx_ir", "onnxruntime_genai")

_WEIGHTS = "*.safetensors"
_WANTED = [_WEIGHTS, "*.json", "*.jinja", "tokenizer.model"]  # of a Hub repository: no programs, no pickles
_HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_MEMORY = 12  # bytes for each weight while it is exported: as fp32, as fp32 in the graph, and quantized
_ROOM = 1 << 30  # bytes of the libraries themselves
_BITS = {4: 5.0, 8: 9.0}  # for a weight, with its scale


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What is exported: a .gguf file or a folder with a checkpoint, and the number of its weights."""

    path: Path
    parameters: int

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def find_source(model: str) -> ExportSource:
    """The source meant by a catalogue name, a .gguf file, a checkpoint's folder, or its name on the Hub.

    A GGUF file is checked. Raises EdgespecError, one line, for anything else.
    """
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if model not in load_catalog() and path.is_dir():
        return _checkpoint(path.absolute())
    if _is_hub_name(model, path):
        return _checkpoint(_from_hub(model))
    path = resolve(model).absolute()
    return ExportSource(path, check_gguf(path).parameters)


def export_onnx(
    source: ExportSource, out: Path, bits: Bits, *, force: bool = False, progress: NamedProgress | None = None
) -> Path:
    """Write `source` with weights of `bits` to the folder `out`, and return it.

    `force`: replace an exported model that is there. Takes minutes. Raises EdgespecError, one line, and
    Cancelled when `progress` stopped it; either leaves `out` as it was.
    """
    out = out.absolute()
    require_extra()
    refuse_destination(out, force)
    require_room(source, out, bits)
    report = progress or (lambda *_: True)
    with work_folder(out, "export") as work:
        run_exporter([str(source.path), str(work), str(bits)], source.path, work, report)
        made = work / MODEL
        try:
            check_onnx(made)
        except EdgespecError as error:
            raise EdgespecError(
                f"{source.path.name} was exported to what does not run here: {error}"
            ) from None
        _replace(made, out, work)
    return out


def run_exporter(arguments: Sequence[str], source: Path, work: Path, report: NamedProgress) -> None:
    """Run `exporter` on `source` with the work folder `work`. Raises EdgespecError, and Cancelled."""
    command = [*worker_command(), *arguments]
    code, output = processes.run(command, _Ticker(work, report), _offline_environment())
    if code:
        raise _failure(source, code, output)


def require_extra() -> None:
    """Raise EdgespecError if the libraries that export are not installed."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        torch = " - after pip install torch in its CPU build, if the CUDA build is too large"
        raise EdgespecError(f"exporting needs {', '.join(missing)}: {how_to_get('export', torch)}")


def refuse_destination(out: Path, force: bool) -> None:
    """Raise EdgespecError if `out` is in the way, or is something that `force` is not meant to replace."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise EdgespecError(f"{printable(str(out), None)} is not a folder: choose another name.")
    try:
        empty = not any(out.iterdir())
    except OSError as error:
        raise unwritable(out, error) from None
    if empty or (force and is_onnx(out)):
        return
    advice = "choose another name." if force else "choose another name, or --force to replace a model."
    raise EdgespecError(f"{printable(str(out), None)} is not empty: {advice}")


def require_room(source: ExportSource, out: Path, bits: Bits) -> None:
    """Raise EdgespecError if disk or memory would not do."""
    # A checkpoint in fp32, the graph with a table in fp32, and once more while it is made smaller.
    checkpoint = 4 * source.parameters if source.is_gguf else 0
    require_space(out.parent, checkpoint + 2 * int(source.parameters * _BITS[bits] / 8) + source.parameters)
    needed, free = source.parameters * _MEMORY + _ROOM, memory_available()
    if needed > free:
        raise EdgespecError(
            f"exporting {source.path.name} takes about {needed >> 20} MiB of memory and {free >> 20} are "
            "free: close other programs, or export a smaller model."
        )


def worker_command() -> list[str]:
    """The exporter's command line. A frozen program has no such libraries: see `require_extra`."""
    return processes.command("_export-worker", "-I", "-m", "edgespec.quant.exporter")


class _Ticker:
    """Reports the progress that the exporting process wrote last."""

    def __init__(self, work: Path, report: NamedProgress) -> None:
        self._file, self._report = work / PROGRESS, report

    def __call__(self) -> bool:
        fraction, what = 0.0, "starting"
        with suppress(OSError, ValueError):
            number, _, words = self._file.read_text("utf-8").partition(" ")
            fraction, what = float(number), words or what
        return self._report(what, fraction)


def _is_hub_name(model: str, path: Path) -> bool:
    return re.fullmatch(_HUB_NAME, model) is not None and not model.endswith(".gguf") and not path.exists()


def _from_hub(name: str) -> Path:
    """The folder in the Hub's own cache that has checkpoint `name`, fetched unless offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = offline_requested()
    try:
        folder = snapshot_download(name, allow_patterns=_WANTED, local_files_only=offline, token=False)
    except LocalEntryNotFoundError:
        why = "Edgespec is offline" if offline else "the Hub does not answer"
        raise EdgespecError(f"{printable(name)} is not on this machine and {why}.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise EdgespecError(f"{printable(name)} cannot be fetched: {printable(str(error), 200)}") from None
    return Path(folder)


def _checkpoint(folder: Path) -> ExportSource:
    """Raises EdgespecError if `folder` has no checkpoint in safetensors."""
    files = sorted(folder.glob(_WEIGHTS))
    if not files or not (folder / "config.json").is_file():
        raise EdgespecError(
            f"{printable(str(folder), None)} has no config.json with .safetensors: name a GGUF file, or "
            "a folder with a checkpoint."
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        weights = sum(map(_weights_in, files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise EdgespecError(f"{printable(str(folder), None)} is damaged: download it again.") from None
    if not isinstance(config, dict) or config.get("quantization_config"):
        raise EdgespecError(
            f"{printable(str(folder), None)} is quantized already: name the checkpoint it came of."
        )
    return ExportSource(folder, weights)


def _weights_in(path: Path) -> int:
    """How many weights a safetensors file has, by its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 100 << 20:
            raise ValueError("no header is that long")
        header = json.loads(file.read(size))
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


def _replace(made: Path, out: Path, work: Path) -> None:
    """Move the finished folder to its name, with all of its data on the disk first."""
    for path in made.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)
    try:
        if out.exists():
            out.replace(work / "old")
        made.replace(out)
    except OSError as error:
        with suppress(OSError):
            (work / "old").replace(out)
        raise unwritable(out.parent, error) from None


def _offline_environment() -> dict[str, str]:
    """Keep the libraries from using the network: all that is needed is on disk."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false"}


def _failure(source: Path, code: int, output: str) -> EdgespecError:
    if code == -9:
        return EdgespecError(
            f"exporting {source.name} was killed, most likely because memory ran out: close other programs"
        )
    if "No space left" in output:
        return EdgespecError("the disk is full: free some and try again")
    lines = output.strip().splitlines()
    reason = printable(lines[-1], 200) if lines else f"the exporter ended with code {code}"
    return EdgespecError(f"{source.name} cannot be exported: {reason}")
