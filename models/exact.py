"""Which batch sizes give, to the bit, the logits of one row at a time: found out on the model itself.

Kernels sum in another order for many rows than for one, so a speculative answer may part from the plain one
where two tokens are nearly tied. With the settings below llama.cpp's attention does not; whether the products
do depends on the types of the weights (docs/experiments.md). Only sizes that were seen to be equal are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgespec.costs import SIZES
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.options import Options
from edgespec.models.runtime import ModelSequence

_LENGTHS = (24, 560)  # tokens before: attention takes another path from 512 on


def exact_options(options: Options) -> Options:
    """A GGUF's `options` on llama.cpp with an 8-bit cache, whose attention has one path for all sizes.

    No setting of ik_llama.cpp was found whose batches are equal to single rows. An ONNX model keeps its own:
    the graph says what is computed.
    """
    if not isinstance(options, LlamaOptions):
        return options
    return replace(options, engine="llama.cpp", flash_attention=True, type_k="q8_0", type_v="q8_0")


def equal_sizes(sequence: ModelSequence, text: Sequence[int], most: int) -> list[int]:
    """The SIZES up to `most` whose logits, and those of the token after, are bitwise those of single rows.

    `text` must have some 600 tokens, of which as many are used as fit into the context. Takes as long as
    reading them and some 250 rows. The sequence is empty afterwards.
    """
    sizes = [n for n in SIZES if n <= most]
    room = min(sequence.model.context_length, len(text)) - sizes[-1] - 1
    for length in {min(length, room) for length in _LENGTHS}:
        sequence.rollback(0)
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
