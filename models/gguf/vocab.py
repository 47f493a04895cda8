"""The vocabulary of a GGUF model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from edgespec.core import EdgespecError
from edgespec.models.gguf.native import Backend, Handle

_UNKNOWN, _UNUSED, _CONTROL = 1, 2, 8  # enum llama_token_attr


class LlamaVocab:
    """The vocabulary of a loaded model, dead when the model is freed.

    Control tokens (`<|im_end|>` and the like) have no bytes: `piece` is empty for them, so they never reach
    a screen. User text is tokenized with `special=False`, so that typing one does not make one.
    """

    def __init__(self, library: Backend, model: Handle) -> None:
        self._library, self._model, self._C = library, model, library.C
        self._vocab = self._C.llama_model_get_vocab(model)
        self.size: int = self._C.llama_vocab_n_tokens(self._vocab)
        self.piece = cache(self._piece)
        self.is_end = cache(self._is_end)

    @property
    def bos(self) -> int | None:
        """The token a text begins with, if the vocabulary has one."""
        return _token(self._C.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int | None:
        return _token(self._C.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants `bos` before every prompt."""
        return bool(self._C.llama_vocab_get_add_bos(self._vocab))

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]:
        """Tokens of `text`; with `special`, control tokens written in it count as such; `begin` adds bos.

        Raises EdgespecError when the tokenizer fails.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        n = self._C.llama_tokenize(self._vocab, data, len(data), tokens, room, begin, special)
        if n < 0:
            raise EdgespecError(f"The model's tokenizer failed on a text of {len(data)} bytes (code {n}).")
        return tokens[:n]

    def text(self, token: int) -> str:
        """How the vocabulary writes a token, control tokens included: for a message, not for output."""
        return self.raw(token).decode("utf-8", "replace")

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def pieces(self) -> list[bytes]:
        """The bytes of every token, as `piece` has them. For one pass over all: nothing is kept."""
        return [self._piece(token) for token in range(self.size)]

    def is_control(self, token: int) -> bool:
        """Whether `token` stands for no text: control tokens, the unknown token, unused places."""
        return self._is(token, _CONTROL | _UNKNOWN | _UNUSED)

    def is_unused(self, token: int) -> bool:
        """Whether `token` is a place that nothing was put in."""
        return self._is(token, _UNUSED)

    def control_texts(self) -> list[str]:
        """The texts that become control tokens when tokenized with `special`."""
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
        """How the vocabulary writes a token, in its own alphabet."""
        return self._C.llama_vocab_get_text(self._vocab, token) or b""

    def _is(self, token: int, attributes: int) -> bool:
        return bool(self._library.token_attributes(self._model, token) & attributes)


def _token(value: int) -> int | None:
    return value if value >= 0 else None
