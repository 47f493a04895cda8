"""Chooses the token ids that a draft keeps, by how often texts use them.

A draft with only the most useful ids has a smaller output head. It never drafts the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

import numpy as np
import numpy.typing as npt

from edgespec.core import Ids
from edgespec.models.gguf.vocab import LlamaVocab

Use = npt.NDArray[np.uint8]
"""How often each token id is used, [vocabulary]: round(8 * log2(count + 1)), at most 255."""

_CHUNK = 1 << 16  # characters tokenized at once
_ZIPF_SHARE, _ZIPF_SHIFT = 0.25, 100


def count_use(vocab: LlamaVocab, texts: Iterable[str]) -> Use:
    """Count how often each id of `vocab` occurs in `texts`."""
    counts = np.zeros(vocab.size, np.int64)
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            counts += np.bincount(vocab.tokenize(text[start : start + _CHUNK]), minlength=vocab.size)
    return as_use(counts)


def as_use(counts: npt.NDArray[np.int64]) -> Use:
    """Convert counts to the logarithmic scale of `Use`, which takes a byte per id and compresses well."""
    use: Use = np.minimum(np.round(8 * np.log2(counts + 1.0)), 255).astype(np.uint8)
    return use


def shipped_use(tokenizer_digest: str) -> Use | None:
    """Return the use in 16 MB of free texts, for the vocabularies of Qwen2.5 and SmolLM2; None for others.

    The texts: Python's library and packages (32%), the Rust book and library's documentation (18%), readmes
    and manuals (30%), JavaScript, C, shell and SQL (16%), manual pages in eight more languages (4%).
    """
    with resources.files(__package__).joinpath("use.npz").open("rb") as file, np.load(file) as tables:
        return np.asarray(tables[tokenizer_digest], np.uint8) if tokenizer_digest in tables else None


def choose(vocab: LlamaVocab, use: Use | None, size: int) -> Ids:
    """Return the `size` most useful ids, ascending: control tokens and single bytes first, then by `use`.

    No corpus has all subjects. Byte-pair vocabularies are in order of frequency in the text they were made
    from, which had more of them, so `use` is added to what Zipf's law expects of that order; without `use`
    the order alone decides.
    """
    ids = np.arange(vocab.size)
    expected = 1 / (ids + _ZIPF_SHIFT)
    if use is not None:
        counts = np.exp2(use / 8) - 1
        expected = counts + _ZIPF_SHARE * max(counts.sum(), 1.0) * expected
    needed = [token for token in range(vocab.size) if len(vocab.piece(token)) <= 1]
    expected[needed] = np.inf
    chosen = np.argsort(-expected, kind="stable")[: max(size, len(needed))]
    return np.sort(chosen)
