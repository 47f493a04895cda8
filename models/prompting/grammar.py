"""Grammars on a model's own tokens, with llguidance: JSON schemas, regular expressions, GBNF, Lark, choices.

A compiled `Grammar` may be shared; each text that keeps to it is followed by a `GrammarState`, a Constraint.
Compiling releases the interpreter's lock. A grammar and its states belong to one thread at a time.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from edgespec.core import EdgespecError, Mask
from edgespec.models.prompting import grammar_sources
from edgespec.models.vocab import Vocabulary

GrammarKind = Literal["json_schema", "json_object", "regex", "gbnf", "lark", "choice"]

Spell = Callable[[bytes], list[int]]
"""Tokens of a text, as the model's own tokenizer writes it."""

_KEPT = 32  # compiled grammars: an agent asks for the same few again and again
_SECONDS = 10.0  # to compile in; what takes longer was made to
_CONTROL = b"\xff"  # marks the bytes of tokens that stand for no text
# Those of the library, but for what bounds memory (a state of the lexer is one to two kB) and for messages
# that would show a whole grammar.
_LIMITS = LLParserLimits(
    max_lexer_states=50_000, max_grammar_size=200_000, precompute_large_lexemes=False, verbose_errors=False
)


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Making it reads every token once: 0.2 to 1 s."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        ends = [token for token in range(vocab.size) if vocab.is_end(token)]
        if vocab.eos in ends:  # the library takes the first for the usual one
            ends.sort(key=lambda token: token != vocab.eos)
        if not ends:
            raise EdgespecError("The model has no token that ends a text: it cannot follow a grammar.")
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
        """The grammar that `source` describes.

        A "json_schema" is its text or what json.loads makes of it, a "choice" a list of texts, a
        "json_object" (any) needs no source, the others are texts. Raises EdgespecError, which says what is
        wrong, for what is invalid, unsupported or too costly, and for what no text could ever satisfy.
        """
        match kind, source:
            case "json_object", None:
                text = _schema_grammar({"type": "object"})
            case "json_schema", str() | Mapping() | bool():
                text = _schema_grammar(source)
            case "regex", str(pattern):
                text = LLMatcher.grammar_from_regex(grammar_sources.regex(pattern))
            case "gbnf", str(grammar):
                text = grammar_sources.gbnf(grammar)
            case "lark", str(grammar):
                text = grammar_sources.lark(grammar)
            case "choice", list() | tuple():
                text = grammar_sources.choices(cast("Sequence[str]", source))
            case _:
                raise EdgespecError(f"A grammar of kind {kind} cannot be made of {type(source).__name__}.")
        return self.build(text)

    def build(self, text: str) -> Grammar:
        """The grammar of `text`, in the library's own words and bounded already.

        Raises EdgespecError when the library refuses it, when it takes too long, and when it allows no text.
        """
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        made: list[LLMatcher | BaseException] = []

        def make() -> None:
            try:
                matcher = LLMatcher(self._tokenizer, text, limits=_LIMITS, log_level=0)
                made.append(_tried(matcher))
            except BaseException as error:  # noqa: BLE001 - the library's panics are BaseExceptions
                made.append(error)

        # What is being compiled cannot be stopped, only left behind.
        worker = threading.Thread(target=make, name="grammar", daemon=True)
        worker.start()
        worker.join(_SECONDS)
        if not made:
            raise EdgespecError("The grammar takes too long to compile: make it simpler.")
        (matcher,) = made
        if isinstance(matcher, BaseException):
            raise EdgespecError(f"The grammar cannot be compiled: {grammar_sources.shown(str(matcher))}.")
        if reason := _refusal(matcher):
            raise EdgespecError(f"The grammar cannot be used: {reason}.")
        grammar = self._known[text] = Grammar(matcher, self._vocab.size, self._ends, self._spell)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return grammar


class Grammar:
    """A compiled grammar, from which texts start."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: frozenset[int], spell: Spell) -> None:
        self._matcher, self._size, self._ends, self._spell = matcher, vocab_size, ends, spell

    def start(self) -> GrammarState:
        """The state before the first token of a new text. Costs microseconds."""
        return GrammarState(self._matcher.deep_copy(), self._size, self._ends, self._spell)


class GrammarState:
    """Where one text stands in its grammar: a Constraint.

    Where only one text may follow, so may only its tokens as the model's own tokenizer writes them. Where the
    text may end, so may any end token of the model.
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
        # An end token is looked at, not taken: it would have to be taken back.
        ends = taken < len(tokens) and tokens[taken] in self._ends and self._may_end()
        self._back(taken)
        return taken + ends

    def copy(self) -> GrammarState:
        """A state of its own that stands where this one does."""
        return GrammarState(self._matcher.deep_copy(), self._size, self._ends, self._spell)

    def _may_end(self) -> bool:
        return self._matcher.is_stopped() or self._matcher.is_accepting()

    def _walk(self, tokens: Sequence[int]) -> int:
        """Take the leading ones of `tokens` that the masks allow, end tokens aside; how many they were."""
        matcher, taken = self._matcher, 0
        for token in tokens:
            if token in self._ends or matcher.is_stopped():
                break
            forced = matcher.compute_ff_tokens()
            # The library itself would take any tokens that spell what is forced.
            if (forced and forced[0] != token) or not matcher.try_consume_tokens([token]):
                break
            taken += 1
        return taken

    def _back(self, taken: int) -> None:
        if taken:
            self._matcher.rollback(taken)
        self._check()

    def _check(self) -> None:
        # The library answers an error with a mask of end tokens: a broken text that looks complete.
        if self._matcher.is_error():
            raise EdgespecError(f"The grammar cannot be followed any further: {_refusal(self._matcher)}.")


class _Tokenizer:
    """The vocabulary as the library wants it."""

    def __init__(self, vocab: Vocabulary, end: int) -> None:
        self._vocab = vocab
        self.eos_token_id, self.bos_token_id = end, None
        pieces = vocab.pieces()
        self.tokens = [
            _CONTROL + vocab.text(token).encode() if vocab.is_control(token) else piece
            for token, piece in enumerate(pieces)
        ]
        # Some tokenizers put a space before every text, which a text in the middle does not have.
        self._lead = "" if self._spell("a") == b"a" else "\x02"  # merges with nothing
        self._skip = len(vocab.tokenize(self._lead)) if self._lead else 0

    def __call__(self, text: bytes) -> list[int]:
        return self._vocab.tokenize(self._lead + text.decode("utf-8", "replace"))[self._skip :]

    def _spell(self, text: str) -> bytes:
        return b"".join(self.tokens[token] for token in self._vocab.tokenize(text))


def _schema_grammar(schema: str | grammar_sources.Schema) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(grammar_sources.json_schema(schema)))
    except (TypeError, ValueError) as error:
        raise EdgespecError(f"The schema cannot be used: {grammar_sources.shown(str(error))}.") from None


def _tried(matcher: LLMatcher) -> LLMatcher:
    """`matcher`, or a copy that failed: what allows no text, or forces one without end, is seen at once."""
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    if forced := trial.compute_ff_tokens():
        trial.consume_token(forced[0])
        trial.compute_bitmask()
    return trial if trial.is_error() else matcher


def _refusal(matcher: LLMatcher) -> str:
    """Why the matcher stopped, "" if it did not or did so at the end of a text."""
    if not matcher.is_error():
        return ""
    reason = grammar_sources.shown(matcher.get_error())
    return "no text satisfies it" if "NoExtension" in reason else reason.removesuffix(" <non-verbose/>")
