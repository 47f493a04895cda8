"""The vocabulary of an ONNX model's folder, `tokenizer.json`, behind the interface of a GGUF's Vocab."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from edgespec.core import EdgespecError
from edgespec.models.onnx.check import OnnxSummary
from edgespec.models.onnx.folder import TOKENIZER, read_bytes, read_json, read_text
from edgespec.text import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Which tokens steer, by their text, as llama.cpp has it: tokenizer.json marks only some of them as special,
# and the other files of a model name only one that ends a text.
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
    "<|end_of_text|>", "<end_of_utterance>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
}  # fmt: skip
_CONTROL = _ENDS | {
    f"{a}{name}{b}"
    for a, b in (("<|", "|>"), ("<", ">"))
    for name in ("fim_prefix", "fim_suffix", "fim_middle", "fim-prefix", "fim-suffix", "fim-middle")
}


class OnnxVocab:
    """Text to tokens, tokens to bytes. Control tokens have no bytes, as in `Vocab`.

    The graph may know more tokens than the tokenizer, padding to a round number: those stand for nothing.
    """

    def __init__(self, summary: OnnxSummary) -> None:
        """Raises EdgespecError where the tokenizer is not valid or knows tokens that the model does not."""
        self._tokenizer = _load(summary)
        self.size = summary.vocab_size
        self._known = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        most = max([self._known - 1, *added])
        if most >= self.size:
            raise EdgespecError(
                f"{summary.name} knows {self.size} tokens and its {TOKENIZER} has one of number {most}: "
                "they do not belong together."
            )
        self._special = {token for token, one in added.items() if one.special}
        self._added = {token: one.content for token, one in added.items()}
        self._bytes_of = _byte_level() if _is_byte_level(self._tokenizer) else None
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if isinstance(unknown, str) and (token := self._tokenizer.token_to_id(unknown)) is not None:
            self._special.add(token)
        self.bos = summary.bos if summary.bos is not None and summary.bos < self.size else None
        named = [token for token in summary.ends if 0 <= token < self.size]
        self._ends = {*named, *(token for token in self._special if self._added.get(token) in _ENDS)}
        self.eos = named[0] if named else min(self._ends, default=None)
        self.adds_bos = self.bos is not None and self._tokenizer.encode("a").ids[:1] == [self.bos]
        self.piece = cache(self._piece)

    def is_end(self, token: int) -> bool:
        return token in self._ends

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]:
        """Tokens of `text`; with `special`, control tokens written in it count as such; `begin` adds bos."""
        self._tokenizer.encode_special_tokens = not special
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=False).ids
        return [self.bos, *ids] if begin and self.adds_bos and self.bos is not None else ids

    def raw(self, token: int) -> bytes:
        """How the vocabulary writes a token, in its own alphabet; empty for those it does not have."""
        text = self._tokenizer.id_to_token(token) if 0 <= token < self.size else None
        return (text or "").encode("utf-8", "replace")

    def text(self, token: int) -> str:
        """How the vocabulary writes a token, control tokens included: for a message, not for output."""
        return self.raw(token).decode("utf-8", "replace")

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def pieces(self) -> list[bytes]:
        """The bytes of every token, as `piece` has them. For one pass over all: nothing is kept."""
        return [self._piece(token) for token in range(self.size)]

    def is_unused(self, token: int) -> bool:
        return not self.raw(token)

    def is_control(self, token: int) -> bool:
        """Whether `token` stands for no text: control tokens, the unknown token, unused places."""
        return token in self._special or self.is_unused(token)

    def control_texts(self) -> list[str]:
        """The texts that become control tokens when tokenized with `special`."""
        return [self.text(token) for token in sorted(self._special)]

    def _piece(self, token: int) -> bytes:
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode("utf-8", "replace")
        text = self.text(token)
        if self._bytes_of is not None:
            known = self._bytes_of
            return b"".join(known[c] if c in known else c.encode("utf-8", "replace") for c in text)
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace("\u2581", " ").encode("utf-8", "replace")


def chat_template(summary: OnnxSummary) -> str | None:
    """The Jinja source of the folder's own chat template: untrusted text."""
    folder = summary.path.parent
    if (text := read_text(folder, "chat_template.jinja")) is not None:
        return text
    template = (read_json(folder, "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _load(summary: OnnxSummary) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer

    try:
        # Straight from the bytes: as Python's objects the same would take 80 MB.
        tokenizer = Tokenizer.from_buffer(read_bytes(summary.path.parent, TOKENIZER))
        tokenizer.no_truncation()  # a prompt is read whole, and nothing else
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder().values()
        # Or typing one would make one.
        tokenizer.add_special_tokens(
            [
                AddedToken(one.content, special=True, normalized=False)
                for one in added
                if one.content in _CONTROL
            ]
        )
    except (EdgespecError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - the library's panics are BaseExceptions
        raise EdgespecError(
            f"{summary.name}/{TOKENIZER} is not valid ({printable(error)}). "
            "Export or download the model again."
        ) from None
    return tokenizer


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return any("ByteLevel(" in str(part) for part in (tokenizer.decoder, tokenizer.pre_tokenizer))


@lru_cache(1)
def _byte_level() -> dict[str, bytes]:
    """The bytes that byte-level BPE's printable stand-ins are for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {
        chr(256 + i): bytes([byte]) for i, byte in enumerate(others)
    }
