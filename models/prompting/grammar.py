"""Grammars on a model's tokens, with llguidance: JSON schemas, regular expressions, GBNF, Lark, choices.

A compiled `Grammar` may be shared; each generation has a `GrammarState` of it, a Constraint. Compiling
releases the GIL. Only one thread at a time may use a grammar and its states.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from edgespec.core import EdgespecError, Mask
from edgespec.models.prompting import grammar_sources
from edgespec.models.prompting.schema_exact import has_exact_rules, json_rule
from edgespec.models.vocab import Vocabulary

GrammarKind = Literal["json_schema", "json_object", "regex", "gbnf", "lark", "choice"]

Spell = Callable[[bytes], list[int]]
"""Tokenizes a text with the model's own tokenizer."""

_PLACE = re.compile(r"^at \d+\(\d+\): ")
_KEPT = 32  # compiled grammars: agents repeat the same few
_SECONDS = 10.0  # limit for compiling; only malicious grammars take longer
_CONTROL = b"\xff"  # prefix for the bytes of tokens without text
# The library's defaults, except limits on memory (a lexer state takes one to two kB) and messages that would
# contain the whole grammar.
_LIMITS = LLParserLimits(
    max_lexer_states=50_000, max_grammar_size=200_000, precompute_large_lexemes=False, verbose_errors=False
)


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Construction reads each token once: 0.2 to 1 s."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        ends = [token for token in range(vocab.size) if vocab.is_end(token)]
        if vocab.eos in ends:  # the library uses the first as the default
            ends.sort(key=lambda token: token != vocab.eos)
        if not ends:
            raise EdgespecError("the model has no end token, which grammars need: choose another model")
        self._ends = frozenset(ends)
        self._spell = _Tokenizer(vocab, ends[0])
        tokenizer = TokenizerWrapper(self._spell)
        self._tokenizer = LLTokenizer(
            tokenizer, n_vocab=vocab.size, eos_token=ends, slices=LLTokenizer.json_slices()
        )
        self._known: OrderedDict[str, Grammar] = OrderedDict()

    def compile(
        self, kind: GrammarKind, source: str | Mapping[str, Any] | Sequence[str] | bool | None = None
    ) -> Grammar:
        """Compile `source`.

        A "json_schema" is a string or the parsed value, a "choice" a list of strings, a "json_object" (any)
        has no source, the others are strings. Raises EdgespecError if it is invalid, unsupported or too
        expensive, or if no text can satisfy it.
        """
        match kind, source:
            case "json_object", None:
                text = _schema_grammar({"type": "object"})
            case "json_schema", str() | Mapping() | bool():
                text = _schema_grammar(grammar_sources.read_schema(source))
            case "regex", str(pattern):
                text = LLMatcher.grammar_from_regex(grammar_sources.regex(pattern))
            case "gbnf", str(grammar):
                text = grammar_sources.gbnf(grammar)
            case "lark", str(grammar):
                text = grammar_sources.lark(grammar)
            case "choice", list() | tuple():
                text = grammar_sources.choices(cast("Sequence[str]", source))
            case _:
                raise EdgespecError(
                    f"a grammar of kind {kind} cannot be compiled from {type(source).__name__}"
                )
        return self.build(text)

    def build(self, text: str) -> Grammar:
        """Compile `text`, a Lark grammar with bounded size.

        Raises EdgespecError if the library refuses it, if it takes too long, and if it allows no text.
        """
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        grammar = self._known[text] = Grammar(self._matcher(text), self._vocab.size, self._ends, self._spell)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return grammar

    def refusal(self, schema: grammar_sources.Schema, *, strict: bool) -> str | None:
        """Return why a JSON schema cannot be compiled, None if it can."""
        if schema is False:
            return "no value satisfies it"
        try:
            self._matcher(json_rule("start", schema, strict=strict))
        except (EdgespecError, TypeError, ValueError) as error:
            reason = str(error).removeprefix("cannot use the grammar: ")
            return _PLACE.sub("", reason).removeprefix("failed to compile JSON schema: ")
        return None

    def _matcher(self, text: str) -> LLMatcher:
        made: list[LLMatcher | BaseException] = []

        def make() -> None:
            try:
                matcher = LLMatcher(self._tokenizer, text, limits=_LIMITS, log_level=0)
                made.append(_tried(matcher))
            except BaseException as error:  # noqa: BLE001 - the library's panics are BaseExceptions
                made.append(error)

        # A compilation cannot be stopped, only abandoned.
        worker = threading.Thread(target=make, name="grammar", daemon=True)
        worker.start()
        worker.join(_SECONDS)
        if not made:
            raise EdgespecError("the grammar takes too long to compile: make it simpler")
        (matcher,) = made
        if isinstance(matcher, BaseException):
            raise EdgespecError(f"cannot compile the grammar: {grammar_sources.shown(str(matcher))}")
        if reason := _refusal(matcher):
            raise EdgespecError(f"cannot use the grammar: {reason}")
        return matcher


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: frozenset[int], spell: Spell) -> None:
        self._matcher, self._size, self._ends, self._spell = matcher, vocab_size, ends, spell

    def start(self) -> GrammarState:
        """Return the state before the first token of a generation. Takes microseconds."""
        return GrammarState(self._matcher.deep_copy(), self._size, self._ends, self._spell)


class GrammarState:
    """The state of one generation in its grammar: a Constraint.

    Where only one text may follow, only its tokens by the model's own tokenizer are allowed. Where the text
    may end, every end token of the model is allowed.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: frozenset[int], spell: Spell) -> None:
        self._matcher, self._size, self._ends, self._spell = matcher, vocab_size, ends, spell
        self._mask = np.zeros((vocab_size + 31) // 32, np.uint32)

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self) -> Mask:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def accept(self, token: int) -> None:
        if token in self._ends and self.finished:
            return
        self._matcher.consume_token(token)
        self._check()

    def forced(self, limit: int, after: Sequence[int] = ()) -> tuple[int, ...]:
        matcher = self._matcher
        if limit < 1 or matcher.is_stopped():
            return ()
        taken = self._walk(after)
        found = matcher.compute_ff_tokens() if taken == len(after) and not matcher.is_stopped() else []
        self._back(taken)
        return tuple(found[:limit])

    def spelled(self, after: Sequence[int] = ()) -> tuple[int, ...]:
        matcher = self._matcher
        if matcher.is_stopped():
            return ()
        taken = self._walk(after)
        text = matcher.compute_ff_bytes() if taken == len(after) and not matcher.is_stopped() else b""
        found = self._spell(text) if text else []
        kept = self._walk(found)
        self._back(taken + kept)
        return tuple(found[:kept])

    def admits(self, tokens: Sequence[int]) -> int:
        taken = self._walk(tokens)
        # An end token is not consumed, because it would have to be rolled back.
        ends = taken < len(tokens) and tokens[taken] in self._ends and self._may_end()
        self._back(taken)
        return taken + ends

    def copy(self) -> GrammarState:
        """Return an independent copy."""
        return GrammarState(self._matcher.deep_copy(), self._size, self._ends, self._spell)

    def _may_end(self) -> bool:
        return self._matcher.is_stopped() or self._matcher.is_accepting()

    def _walk(self, tokens: Sequence[int]) -> int:
        """Consume the leading `tokens` that the masks allow, except end tokens, and return their number."""
        matcher, taken = self._matcher, 0
        for token in tokens:
            if token in self._ends or matcher.is_stopped():
                break
            forced = matcher.compute_ff_tokens()
            # The library would accept any tokenization of the forced text.
            if (forced and forced[0] != token) or not matcher.try_consume_tokens([token]):
                break
            taken += 1
        return taken

    def _back(self, taken: int) -> None:
        if taken:
            self._matcher.rollback(taken)
        self._check()

    def _check(self) -> None:
        # After an error the library returns a mask of end tokens, so that an invalid text would look
        # complete.
        if self._matcher.is_error():
            raise EdgespecError(f"cannot follow the grammar any further: {_refusal(self._matcher)}")


class _Tokenizer:
    """The vocabulary in the form that the library requires."""

    def __init__(self, vocab: Vocabulary, end: int) -> None:
        self._vocab = vocab
        self.eos_token_id, self.bos_token_id = end, None
        pieces = vocab.pieces()
        self.tokens = [
            _CONTROL + vocab.text(token).encode() if vocab.is_control(token) else piece
            for token, piece in enumerate(pieces)
        ]
        # Some tokenizers insert a space before a text, which is wrong within a generation.
        self._lead = "" if self._spell("a") == b"a" else "\x02"  # never part of a merge
        self._skip = len(vocab.tokenize(self._lead)) if self._lead else 0

    def __call__(self, text: bytes) -> list[int]:
        return self._vocab.tokenize(self._lead + text.decode("utf-8", "replace"))[self._skip :]

    def _spell(self, text: str) -> bytes:
        return b"".join(self.tokens[token] for token in self._vocab.tokenize(text))


def _schema_grammar(schema: grammar_sources.Schema) -> str:
    try:
        if has_exact_rules(schema):
            return json_rule("start", schema)
        return LLMatcher.grammar_from_json_schema(json.dumps(grammar_sources.json_schema(schema)))
    except (TypeError, ValueError) as error:
        raise EdgespecError(f"cannot use the schema: {grammar_sources.shown(str(error))}") from None


def _tried(matcher: LLMatcher) -> LLMatcher:
    """Return `matcher`, or a failed copy of it if it allows no text or forces one without end."""
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    if forced := trial.compute_ff_tokens():
        trial.consume_token(forced[0])
        trial.compute_bitmask()
    return trial if trial.is_error() else matcher


def _refusal(matcher: LLMatcher) -> str:
    """Return the matcher's error, "" if there is none."""
    if not matcher.is_error():
        return ""
    reason = grammar_sources.shown(matcher.get_error())
    return "no text satisfies it" if "NoExtension" in reason else reason.removesuffix(" <non-verbose/>")
