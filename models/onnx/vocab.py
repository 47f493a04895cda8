"""The vocabulary of an ONNX model's folder, `tokenizer.json`, with the interface of Vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from edgespec.core import EdgespecError
from edgespec.models.onnx.check import OnnxSummary
from edgespec.models.onnx.folder import AGAIN, TOKENIZER, read_bytes, read_json, read_text
from edgespec.text import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Texts of end and control tokens, as in llama.cpp: tokenizer.json marks only some of them as special, and the
# other files of a model name only one end token.
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
    """A Vocabulary from `tokenizer.json`. Control tokens have no bytes, as in `LlamaVocab`.

    The graph may have more tokens than the tokenizer, as padding to a round number: those have no text.
    """

    def __init__(self, summary: OnnxSummary) -> None:
        """Load it. Raises EdgespecError if the tokenizer is invalid or has tokens that the model has not."""
        self._tokenizer = _load(summary)
        self.size = summary.vocab_size
        self._known = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        most = max([self._known - 1, *added])
        if most >= self.size:
            raise EdgespecError(
                f"{summary.name} has {self.size} tokens and its {TOKENIZER} one with id {most}: "
                "use the files of one model"
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
        """Tokenize `text`; `special` parses control tokens in it, `begin` adds `bos` where `adds_bos`."""
        self._tokenizer.encode_special_tokens = not special
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=False).ids
        return [self.bos, *ids] if begin and self.adds_bos and self.bos is not None else ids

    def raw(self, token: int) -> bytes:
        """Return a token as stored in the vocabulary, in its own encoding; empty for unknown ids."""
        text = self._tokenizer.id_to_token(token) if 0 <= token < self.size else None
        return (text or "").encode("utf-8", "replace")

    def text(self, token: int) -> str:
        """Return the vocabulary's text of a token, also of control tokens: for messages, not for output."""
        return self.raw(token).decode("utf-8", "replace")

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def pieces(self) -> list[bytes]:
        """Return `piece` of every token, without caching."""
        return [self._piece(token) for token in range(self.size)]

    def is_unused(self, token: int) -> bool:
        return not self.raw(token)

    def is_control(self, token: int) -> bool:
        """Whether `token` has no text: control tokens, the unknown token, padding."""
        return token in self._special or self.is_unused(token)

    def control_texts(self) -> list[str]:
        """Return the texts that `tokenize` with `special` turns into control tokens."""
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
    """Return the Jinja source of the folder's own chat template: untrusted text."""
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
        # From bytes, because the same JSON as Python objects would take 80 MB.
        tokenizer = Tokenizer.from_buffer(read_bytes(summary.path.parent, TOKENIZER))
        tokenizer.no_truncation()  # prompts must not be truncated or padded
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder().values()
        # Otherwise their text in user input would become control tokens.
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
            f"{summary.name}/{TOKENIZER} is not valid ({printable(error)}): {AGAIN}"
        ) from None
    return tokenizer


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return any("ByteLevel(" in str(part) for part in (tokenizer.decoder, tokenizer.pre_tokenizer))


@lru_cache(1)
def _byte_level() -> dict[str, bytes]:
    """Return the byte for each printable character that byte-level BPE uses in its place."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {
        chr(256 + i): bytes([byte]) for i, byte in enumerate(others)
    }
