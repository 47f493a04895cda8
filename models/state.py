"""KV caches on disk: a conversation that is opened again continues without prefill.

One file per conversation. It contains the conversation, so only its owner may read it; its digest is checked
before an engine gets the data, because engines do not validate it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from edgespec.files import replacing
from edgespec.models.runtime import ModelSequence

_MAGIC = b"edgespec-state-1\n"
_MOST_HEADER = 10_000_000  # bytes


def state_key(sequence: ModelSequence) -> str:
    """Return a key for what a state depends on: weights, engine build, cache types."""
    return hashlib.sha256(repr(sequence.model.fingerprint()).encode()).hexdigest()


def save_state(sequence: ModelSequence, path: Path) -> bool:
    """Write the state of `sequence` to `path` atomically. False if it is empty or cannot be written."""
    if not sequence.tokens:
        return False
    data = sequence.state()
    header = json.dumps(
        {
            "key": state_key(sequence),
            "tokens": list(sequence.tokens),
            "bytes": len(data),
            "sha256": hashlib.sha256(data.data).hexdigest(),
        }
    ).encode()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(_MAGIC + header + b"\n")
            file.write(data.data)
    except OSError:
        return False
    return True


def state_tokens(sequence: ModelSequence, path: Path) -> list[int] | None:
    """Return the tokens of the state in `path`, None if it does not fit `sequence`."""
    found = _header(sequence, path)
    return found and found[0]


def load_state(sequence: ModelSequence, path: Path) -> bool:
    """Restore into `sequence` the state in `path`. For any other file, empty it and return False."""
    sequence.rollback(0)
    found = _header(sequence, path)
    if found is None:
        return False
    tokens, size, digest, start = found
    with contextlib.suppress(OSError, ValueError):
        data = np.fromfile(path, np.uint8, size + 1, offset=start)
        if len(data) == size and hashlib.sha256(data.data).hexdigest() == digest:
            return sequence.restore(tokens, data)
    return False


def _header(sequence: ModelSequence, path: Path) -> tuple[list[int], int, object, int] | None:
    """Return tokens, size, digest and offset of the data; None if it does not fit `sequence`."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError),
        path.open("rb") as file,
    ):
        if file.readline(len(_MAGIC)) != _MAGIC:
            return None
        header = json.loads(file.readline(_MOST_HEADER))
        tokens, size = header["tokens"], header["bytes"]
        if header["key"] == state_key(sequence) and _fits(sequence, tokens, size):
            return tokens, size, header["sha256"], file.tell()
    return None


def _fits(sequence: ModelSequence, tokens: object, size: object) -> bool:
    model = sequence.model
    return (
        isinstance(tokens, list)
        and 0 < len(tokens) <= model.context_length
        and all(type(one) is int and 0 <= one < sequence.vocab_size for one in tokens)
        and type(size) is int
        and 0 < size <= model.state_bytes
    )
