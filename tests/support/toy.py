"""A vocabulary without a model: the bytes, some longer tokens, and what a text ends with."""

from __future__ import annotations

from collections.abc import Sequence

LONGER = (
    '{"', '":', '": ', ' "', '", "', '"}', '"]', "}, {", ", ", ": ", "true", "false", "null", "ab", "abc",
    "name", "na", "me", 'e"', "10", "20", "é", "tool", "_call", "<tool_call>", "call>", ">\n", "\n{", '"arg',
    "uments", "  ", "hello", " wor", "ld",
)  # fmt: skip


class ToyVocab:
    """What GrammarCompiler reads of a Vocab. Texts are tokenized with the longest token that fits."""

    def __init__(self) -> None:
        self._pieces = [bytes([b]) for b in range(256)] + [text.encode() for text in LONGER] + [b""] * 3
        self.size = len(self._pieces)
        self.control, self.eos, self.other_end = range(self.size - 3, self.size)
        self._ids = {piece: token for token, piece in enumerate(self._pieces) if piece}
        self._longest = max(map(len, self._pieces))

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def pieces(self) -> list[bytes]:
        return self._pieces

    def is_end(self, token: int) -> bool:
        return token in (self.eos, self.other_end)

    def is_control(self, token: int) -> bool:
        return token >= self.control

    def text(self, token: int) -> str:
        names = {self.control: "<|control|>", self.eos: "<|end|>", self.other_end: "<|also_end|>"}
        return names.get(token) or self._pieces[token].decode("utf-8", "replace")

    def tokenize(self, text: str) -> list[int]:
        data, tokens = text.encode(), []
        while data:
            n = next(n for n in range(self._longest, 0, -1) if data[:n] in self._ids)
            tokens.append(self._ids[data[:n]])
            data = data[n:]
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(self._pieces[token] for token in tokens).decode("utf-8", "replace")
