"""The interface of vocabularies, and a comparison of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Vocabulary(Protocol):
    """The vocabulary of any model; `gguf.vocab.LlamaVocab` documents the methods."""

    @property
    def size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...
    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]: ...
    def raw(self, token: int) -> bytes: ...
    def text(self, token: int) -> str: ...
    def piece(self, token: int, /) -> bytes: ...
    def pieces(self) -> list[bytes]: ...
    def detokenize(self, tokens: Sequence[int]) -> str: ...
    def is_end(self, token: int, /) -> bool: ...
    def is_control(self, token: int) -> bool: ...
    def is_unused(self, token: int) -> bool: ...
    def control_texts(self) -> list[str]: ...


def first_difference(target: Vocabulary, draft: Vocabulary) -> str | None:
    """Return in words why `draft` cannot draft for `target`, None if it can.

    Each token id must have the same text in both. Padding (tokens marked unused) is ignored, because models
    of one family are padded to different sizes; so are end tokens, because only the target's count.
    """
    for token in range(min(target.size, draft.size)):
        if target.raw(token) != draft.raw(token):
            if target.is_unused(token) and draft.is_unused(token):
                continue
            return (
                f"token {token} is {target.text(token)!r} in the target, {draft.text(token)!r} in the draft"
            )
    longer, shorter = (target, draft) if target.size > draft.size else (draft, target)
    if not all(longer.is_unused(token) for token in range(shorter.size, longer.size)):
        return f"the target has {target.size} tokens and the draft {draft.size}"
    return None


class ByteVocab:
    """The 256 bytes and one end token, for models without a tokenizer and for tests."""

    size, bos, eos, adds_bos = 257, None, 256, False

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def raw(self, token: int) -> bytes:
        return self.piece(token) or b"<end>"

    def text(self, token: int) -> str:
        return self.raw(token).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 256 else b""

    def pieces(self) -> list[bytes]:
        return [self.piece(token) for token in range(self.size)]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        return token == self.eos

    def is_control(self, token: int) -> bool:
        return token == self.eos

    def is_unused(self, token: int) -> bool:
        return False

    def control_texts(self) -> list[str]:
        return ["<end>"]
