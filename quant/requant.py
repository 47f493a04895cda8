"""Requantizes GGUF files, and finds which file was made from which.

Knows nothing of speed: `draft` measures.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from edgespec import processes
from edgespec.core import EdgespecError, Progress
from edgespec.machine.sensors import compute_cores
from edgespec.models.gguf import trial
from edgespec.models.gguf.backends import files
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.text import printable

DraftType = Literal["q4_0", "iq4_nl", "q8_0", "f16", "bf16"]
Mixture = Literal["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"]
"""Recipes of llama.cpp that give each matrix a type of its own."""

_BITS: dict[DraftType | Mixture, float] = {
    **{"q4_0": 4.5, "iq4_nl": 4.5, "q8_0": 8.5, "f16": 16, "bf16": 16},
    **{"q2_k": 3.4, "q3_k_m": 4.0, "q4_k_m": 5.0, "q5_k_m": 5.8, "q6_k": 6.6},
}
_BLOCK = 256  # weights in a block of the k-quants; matrices of other widths get wider types instead

SOURCE_KEY = "edgespec.source"
"""Metadata key of a draft: the fingerprint of the file it was made from."""

_TABLES = ("token_embd.weight", "output.weight")
_MARGIN = 64 << 20  # bytes of disk left for other programs
_SAMPLES, _SAMPLE = 64, 1 << 16


def requantize(
    source: Path,
    out: Path,
    kind: DraftType | Mixture,
    progress: Progress | None = None,
    pure: bool = True,
) -> Path:
    """Write `source` to `out` as `kind`, and return `out`.

    With `pure`, every matrix is of that type; without, llama.cpp keeps some of them in a wider one.

    `source` may be quantized already: a wider `kind` then changes how its weights are computed with, not how
    good they are. Vocabulary and chat template are kept. Takes seconds a gigabyte, IQ4_NL minutes. `out`
    appears whole or not at all. Raises EdgespecError, one line, and Cancelled when `progress` stopped it.
    """
    summary = check_gguf(source)
    if out.exists() and out.samefile(source):
        raise EdgespecError(f"{source} cannot be written over itself: choose another name")
    needed = size_as(source, summary, kind, pure)
    require_space(out.parent, needed)
    with replacing(out) as partial:
        report = progress or (lambda _: True)
        _run(source, partial, kind, pure, lambda: report(_fraction(partial, needed)))
        report(1.0)
        try:
            made = check_gguf(partial)
        except EdgespecError:  # its message would advise another download of a temporary file
            raise EdgespecError(f"llama.cpp wrote a damaged {out.name}: try again") from None
        if made.tokenizer_digest != summary.tokenizer_digest:
            raise EdgespecError(f"llama.cpp changed the vocabulary of {source.name}: use another weight type")
    return out


def size_as(source: Path, summary: GgufSummary, kind: DraftType | Mixture, pure: bool = True) -> int:
    """Estimate the bytes of `source` with its weights as `kind`, rather too high than too low."""
    header = max(0, source.stat().st_size - summary.tensor_bytes)
    bits = _BITS[kind]
    if not pure and bits < 8.5:  # the embeddings and the output head get a wider type
        tables = [math.prod(one.shape) for name, one in summary.tensors.items() if name in _TABLES]
        odd = any(len(one.shape) > 1 and one.shape[0] % _BLOCK for one in summary.tensors.values())
        if odd:
            bits = 8.5 if bits > 6 else 6.6
        return int((summary.parameters * bits + sum(tables) * (8.5 - bits)) / 8) + header
    return int(summary.parameters * bits / 8) + header


def require_space(folder: Path, needed: int) -> None:
    """Raise EdgespecError if `folder` has no room for `needed` bytes."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise unwritable(folder, error) from None
    if free < needed + _MARGIN:
        raise EdgespecError(
            f"not enough disk in {folder}: {needed + _MARGIN >> 20} MiB are needed, {free >> 20} are free"
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `out`, renamed to `out` unless the block raises."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        try:
            partial.touch()
        except OSError as error:
            raise unwritable(out.parent, error) from None
        yield partial
        with partial.open("rb+") as file:  # after a power cut the name must not exist without its data
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def work_folder(destination: Path, what: str) -> Iterator[Path]:
    """Create a folder next to `destination`, so that a result is moved by a rename; remove it afterwards.

    Its name is known before it exists, so that it is removed wherever Ctrl-C interrupts.
    """
    folder = destination.with_name(f".{destination.name}.{what}-{secrets.token_hex(6)}")
    try:
        try:
            folder.mkdir(0o700)
        except OSError as error:
            raise unwritable(destination.parent, error) from None
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(path: Path) -> str:
    """Return a fingerprint of a model file: SHA-256 of its size and of 4 MiB from all parts of it.

    Takes milliseconds. No protection against forgery, since a draft never changes the output. Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def draft_path(source: Path, kind: str) -> Path:
    """Return the path of a draft made from `source`."""
    return source.with_name(f"{source.stem}.draft-{kind}.gguf")


def made_drafts(source: Path) -> list[Path]:
    """Return the files next to `source` that have the name of a draft of it, whether made from it or not."""
    return sorted(source.parent.glob(glob.escape(source.stem) + ".draft-*.gguf"))


def made_draft(source: Path) -> Path | None:
    """Return the draft that was made from exactly this file, None if there is none. Ignores damaged ones."""
    for path in made_drafts(source):
        with suppress(EdgespecError, OSError):
            if check_gguf(path).metadata.get(SOURCE_KEY) == fingerprint(source):
                return path
    return None


def worker_command() -> list[str]:
    """Return the quantizer's command line. A frozen program calls `quantizer.main` for `_quantize-worker`."""
    return processes.command("_quantize-worker", "-I", "-m", "edgespec.quant.quantizer")


def _run(
    source: Path, partial: Path, kind: DraftType | Mixture, pure: bool, tick: Callable[[], bool]
) -> None:
    trial.start("llama.cpp", files("llama.cpp"), tick)  # a crash in the quantizer has no message
    # Absolute, since the child has another folder, and a name may begin with a hyphen.
    paths = [str(path.absolute()) for path in (source, partial)]
    how = [kind, "pure" if pure else "mixed", str(compute_cores()), SOURCE_KEY, fingerprint(source)]
    code, said = processes.run([*worker_command(), *paths, *how], tick)
    if code:
        raise _failure(source, partial, code, said)


def _fraction(partial: Path, needed: int) -> float:
    with suppress(OSError):
        return min(partial.stat().st_size / needed, 0.99)
    return 0.0


def _failure(source: Path, partial: Path, code: int, output: str) -> EdgespecError:
    if "iostream" in output:  # the message of a C++ stream for a failed write
        return EdgespecError(f"cannot write in {partial.parent}: its disk or your quota is full")
    lines = output.strip().splitlines()
    reason = printable(lines[-1], 200) if lines else f"the quantizer ended with code {code}"
    return EdgespecError(f"{source.name} cannot be requantized: {reason}")


def unwritable(folder: Path, error: OSError) -> EdgespecError:
    """Return an error for the user after `error` while writing in `folder`."""
    return EdgespecError(f"cannot write in {folder}: {error.strerror or error}")
