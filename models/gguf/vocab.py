"""The vocabulary of a GGUF model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from edgespec.core import EdgespecError
from edgespec.models.gguf.native import Backend, Handle

_UNKNOWN, _UNUSED, _CONTROL = 1, 2, 8  # enum llama_token_attr


class LlamaVocab:
    """The vocabulary of a loaded model, invalid after the model is freed.

    Control tokens (`<|im_end|>` and the like) have no bytes: `piece` is empty for them, so they are never
    displayed. User text is tokenized with `special=False`, so that their text in it stays text.
    """

    def __init__(self, library: Backend, model: Handle) -> None:
        self._library, self._model, self._C = library, model, library.C
        self._vocab = self._C.llama_model_get_vocab(model)
        self.size: int = self._C.llama_vocab_n_tokens(self._vocab)
        self.piece = cache(self._piece)
        self.is_end = cache(self._is_end)

    @property
    def bos(self) -> int | None:
        """The beginning-of-sequence token, None if there is none."""
        return _token(self._C.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int | None:
        return _token(self._C.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether prompts must begin with `bos`."""
        return bool(self._C.llama_vocab_get_add_bos(self._vocab))

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]:
        """Tokenize `text`; `special` parses control tokens in it, `begin` adds `bos` where `adds_bos`.

        Raises EdgespecError if the tokenizer fails.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        n = self._C.llama_tokenize(self._vocab, data, len(data), tokens, room, begin, special)
        if n < 0:
            raise EdgespecError(f"the model's tokenizer failed on {len(data)} bytes of text (code {n})")
        return tokens[:n]

    def text(self, token: int) -> str:
        """Return the vocabulary's text of a token, also of control tokens: for messages, not for output."""
        return self.raw(token).decode("utf-8", "replace")

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def pieces(self) -> list[bytes]:
        """Return `piece` of every token, without caching."""
        return [self._piece(token) for token in range(self.size)]

    def is_control(self, token: int) -> bool:
        """Whether `token` has no text: control tokens, the unknown token, padding."""
        return self._is(token, _CONTROL | _UNKNOWN | _UNUSED)

    def is_unused(self, token: int) -> bool:
        """Whether `token` is padding of the vocabulary."""
        return self._is(token, _UNUSED)

    def control_texts(self) -> list[str]:
        """Return the texts that `tokenize` with `special` turns into control tokens."""
        return [self.text(token) for token in range(self.size) if self._is(token, _CONTROL | _UNKNOWN)]

    def _piece(self, token: int) -> bytes:
        if not 0 <= token < self.size:
            return b""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self._C.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def _is_end(self, token: int) -> bool:
        return bool(self._C.llama_vocab_is_eog(self._vocab, token))

    def raw(self, token: int) -> bytes:
        """Return a token as stored in the vocabulary, in its own encoding."""
        return self._C.llama_vocab_get_text(self._vocab, token) or b""

    def _is(self, token: int, attributes: int) -> bool:
        return bool(self._library.token_attributes(self._model, token) & attributes)


def _token(value: int) -> int | None:
    return value if value >= 0 else None
