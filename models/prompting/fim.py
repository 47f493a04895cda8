"""Fill in the middle: prompts of the text before and after a gap, in the control tokens of model families.

The order and the repository's marks are those of llama.cpp's /infill, which Qwen2.5-Coder's technical report
(arXiv 2409.12186) and StarCoder 2's (arXiv 2402.19173) describe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgespec.models.vocab import Vocabulary

_KEYS = {
    "prefix": ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"),
    "suffix": ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"),
    "middle": ("tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"),
    "repository": ("tokenizer.ggml.fim_rep_token_id",),
    "file": ("tokenizer.ggml.fim_sep_token_id",),
}
# Prefix, suffix, middle, repository, file: the tokens of Qwen and CodeGemma, of StarCoder and Granite, of
# SantaCoder, of DeepSeek, of GLM, of Code Llama.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<reponame>", "<filename>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>", "", ""),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", "", ""),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "", ""),
)
_REPOSITORY = "repository\n"


@dataclass(frozen=True, slots=True)
class FimTokens:
    """The ids of the tokens around the parts of a prompt. Not every model separates files."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None = None
    file: int | None = None


@dataclass(frozen=True, slots=True)
class FimPrompt:
    """The text before and after the gap, and other texts that help: (file name, text)."""

    prefix: str
    suffix: str
    extra: Sequence[tuple[str, str]] = ()


def fim_tokens(vocab: Vocabulary, metadata: Mapping[str, Any]) -> FimTokens | None:
    """Return the tokens that a file's metadata names, else those that its vocabulary has; None if neither."""
    given = {name: _given(metadata, keys, vocab.size) for name, keys in _KEYS.items()}
    for family in _FAMILIES:
        ids = dict(zip(_KEYS, (_token(vocab, text) for text in family), strict=True))
        merged = {name: given[name] if given[name] is not None else ids[name] for name in _KEYS}
        prefix, suffix, middle = merged["prefix"], merged["suffix"], merged["middle"]
        if prefix is not None and suffix is not None and middle is not None:
            return FimTokens(prefix, suffix, middle, merged["repository"], merged["file"])
    return None


def fim_ids(vocab: Vocabulary, tokens: FimTokens, prompt: FimPrompt, room: int) -> list[int]:
    """Return the ids of `prompt`, at most `room`.

    Of what does not fit, the text furthest from the gap is left out: a quarter of `room` is for the suffix,
    other texts get what is left, the last of them first.
    """
    start = vocab.tokenize("", begin=True)
    room -= len(start) + 3
    suffix = vocab.tokenize(prompt.suffix)
    prefix = vocab.tokenize(prompt.prefix)
    prefix = prefix[max(0, len(prefix) - (room - min(len(suffix), room // 4))) :]
    suffix = suffix[: max(0, room - len(prefix))]
    gap = [tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle]
    room -= len(prefix) + len(suffix)
    return start + _extra(vocab, tokens, prompt.extra, room) + gap


def written_tokens(vocab: Vocabulary, tokens: FimTokens | None, text: str) -> list[int]:
    """Tokenize a raw prompt. Control tokens written in it are text, but for all three marks of the gap."""
    if tokens is not None:
        marks = {vocab.text(one): one for one in (tokens.prefix, tokens.suffix, tokens.middle)}
        others = {vocab.text(one): one for one in (tokens.repository, tokens.file) if one is not None}
        if all(mark in text for mark in marks):
            known = marks | others
            parts = re.split(f"({'|'.join(map(re.escape, known))})", text)
            inner = ([known[part]] if part in known else vocab.tokenize(part) for part in parts if part)
            return [*vocab.tokenize("", begin=True), *(token for ids in inner for token in ids)]
    return vocab.tokenize(text, begin=True)


def _extra(vocab: Vocabulary, tokens: FimTokens, extra: Sequence[tuple[str, str]], room: int) -> list[int]:
    """Return the last of the `extra` texts that fit into `room` tokens, with the marks of files."""
    separated = tokens.file is not None
    head = [tokens.repository, *vocab.tokenize(_REPOSITORY)] if tokens.repository is not None else []
    here = [tokens.file, *vocab.tokenize("current\n")] if tokens.file is not None else []
    room -= len(head) + len(here)
    found: list[int] = []
    for name, text in reversed(extra):
        mark = [tokens.file] if tokens.file is not None else []
        ids = [*mark, *vocab.tokenize(f"{name}\n{text}" if separated else f"\n\n--- {name} ---\n\n{text}")]
        if len(found) + len(ids) > room:
            break
        found = ids + found
    return [*head, *found, *here] if found else []


def _given(metadata: Mapping[str, Any], keys: Sequence[str], size: int) -> int | None:
    for key in keys:
        value = metadata.get(key)
        if type(value) is int and 0 <= value < size:
            return value
    return None


def _token(vocab: Vocabulary, text: str) -> int | None:
    """Return the id of a token that is written `text`, None if there is none."""
    ids = vocab.tokenize(text, special=True) if text else []
    return ids[0] if len(ids) == 1 and vocab.text(ids[0]) == text else None
