"""Batch sizes whose logits equal, bit for bit, those of one row at a time, found by running the model.

Kernels sum in a different order for many rows than for one, so a speculative answer may differ from the plain
one where two tokens are nearly tied. With the settings below llama.cpp's attention sums in one order; whether
the matrix products do depends on the types of the weights (docs/experiments.md). Only sizes that a test found
equal are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgespec.costs import SIZES
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.options import Options
from edgespec.models.runtime import ModelSequence

_LENGTHS = (24, 560)  # tokens in the cache: attention uses another kernel from 512 on


def exact_options(options: Options) -> Options:
    """Return `options` for llama.cpp with an 8-bit KV cache, whose attention uses one kernel for all sizes.

    No setting of ik_llama.cpp was found whose batches equal single rows. The options of an ONNX model are
    returned unchanged: its graph determines the computation.
    """
    if not isinstance(options, LlamaOptions):
        return options
    return replace(options, engine="llama.cpp", flash_attention=True, type_k="q8_0", type_v="q8_0")


def equal_sizes(sequence: ModelSequence, text: Sequence[int], most: int) -> list[int]:
    """Return the SIZES up to `most` whose logits, and those of the next token, equal single rows bit for bit.

    `text`: about 600 tokens, of which as many are used as fit into the context. Takes as long as evaluating
    them and about 250 single rows. The sequence is empty afterwards.
    """
    sizes = [n for n in SIZES if n <= most]
    room = min(sequence.model.context_length, len(text)) - sizes[-1] - 1
    for length in {min(length, room) for length in _LENGTHS}:
        sequence.rollback(0)
        sequence.mark_at([length])
        sequence.forward(text[:length])
        after = text[length : length + sizes[-1] + 1]
        single = [sequence.forward([token])[0].copy() for token in after]
        equal = []
        for n in sizes:
            sequence.rollback(length)
            rows = [*sequence.forward(after[:n], n).copy(), sequence.forward([after[n]])[0]]
            if all(map(np.array_equal, rows, single)):
                equal.append(n)
        sizes = equal
    sequence.rollback(0)
    return sizes
