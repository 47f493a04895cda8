"""Schemas and grammars for the grammar library: checked, bounded and converted.

They come from any client. The library limits its own work well, so only inputs are refused here on which it
was measured to spend seconds or more, with the cause in the message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from edgespec.core import EdgespecError
from edgespec.models.prompting.schema_numbers import exact_numbers

Schema = Mapping[str, Any] | bool
"""A parsed JSON schema (draft 2020-12)."""

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The layout of JSON: one line, with the separators of Python's json.dumps. Models generate it that way,
and with
a single layout most tokens outside of values are forced."""

_MOST_CHARACTERS = 512 * 1024
_MOST_IN_ONE = 16 * 1024  # characters of one string: a forced string is examined again for each of its tokens
_MOST_NESTED = 100
_MOST_PROPERTIES = 1000  # of one object
_MOST_REPEATED = 2000  # symbols that a regular expression gains from its counted repetitions
_MOST_STATES = 10_000  # of multipleOf: one for each remainder
_FORMATS = {
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
}  # fmt: skip
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
ONES = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames",
    "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MIXED = {"$ref", "anyOf", "dependentSchemas", "if", "not", "oneOf", "unevaluatedProperties"}
# Parts of a regular expression: the count of the previous symbol ({3}, {3,}, {,3}, {3,5}), or a symbol: a
# character class, an escaped character, any other. Lark has also the counts ~3 and ~3..5.
_PARTS = re.compile(
    r"\{(\d{1,18})?(?:,(\d{1,18})?)?\}|~(\d{1,18})(?:\.\.(\d{1,18}))?"
    r"|\[\^?\]?(?:\\.|[^]\\])*\]|\\.|.",
    re.DOTALL,
)
_RULE = re.compile(r"[?!]*([A-Za-z_][\w-]*)(?:\[[^]]*\])?(?:\.-?\d+)?\s*:")
_RULE_PARTS = re.compile(
    r"\{(\d{1,18})?(?:,(\d{1,18})?)?\}|~(\d{1,18})(?:\.\.(\d{1,18}))?"
    r'|"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|[A-Za-z_][\w-]*|//.*|[^\s|]',
)
_OPTIONS = re.compile(r"^[^\"/\n]*\[[^]\n]*\b(max_tokens|stop|temperature)\s*=", re.MULTILINE)
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^]\\])*\]|#.*')
_TOKEN = re.compile(r"!?<[^>\s]+>")
_ESCAPES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)")


def read_json(text: str, name: str) -> Any:
    """Parse JSON. Raises EdgespecError, which begins with `name`, if it is invalid."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise EdgespecError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise EdgespecError(f"{name} is not valid JSON: {error}") from None


def json_schema(schema: Schema | str, name: str = "the schema", *, strict: bool = True) -> dict[str, Any]:
    """Check `schema` and return it for the library, with LAYOUT.

    Objects with `properties` but without `additionalProperties` or `patternProperties` get no others, so that
    a model does not invent any; the result is valid for the original schema too. This is not done where
    schemas are combined, because one may refer to properties of another. Unknown formats are ignored, as the
    specification requires. If not `strict`, so is everything else that the library cannot enforce.

    Raises EdgespecError if it is not a schema or would take too long. Errors begin with `name`.
    """
    value = read_schema(schema, name)
    _check_size(value, name)
    if isinstance(value, bool):
        value = {} if value else {"not": {}}
    for one in _schemas(value):
        _check(one, name)
    together = any("allOf" in one or ("properties" in one and _MIXED & one.keys()) for one in _schemas(value))
    numbered = _mapped(value, lambda one: exact_numbers(one, name, strict))
    rewritten = _mapped(numbered, lambda one: _rewritten(one, not together))
    return {**rewritten, "x-guidance": {**LAYOUT, "lenient": not strict}}


def read_schema(schema: Schema | str, name: str = "the schema") -> Schema:
    """Return a schema as a value. Raises EdgespecError if it is none."""
    value = read_json(schema, name) if isinstance(schema, str) else schema
    if not isinstance(value, bool | Mapping):
        raise EdgespecError(f"{name} must be a JSON object, not {type(value).__name__}")
    return value


def choices(options: Sequence[str]) -> str:
    """Return a Lark grammar of these texts. Raises EdgespecError if there are none, or empty ones."""
    if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
        raise EdgespecError("a choice must be a list of strings, none of them empty")
    _check_size(list(options), "the choice")
    return "start: " + " | ".join(map(literal, dict.fromkeys(options)))


def literal(text: str) -> str:
    """Return `text` as a Lark string literal."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """Return `pattern`. Raises EdgespecError if it is too large."""
    _check_size(pattern, "the regular expression")
    _check_repetition(pattern, "the regular expression")
    return pattern


def lark(grammar: str, name: str = "the grammar") -> str:
    """Return `grammar`. Raises EdgespecError if it is too large or has rule options such as max_tokens."""
    _check_size(grammar.splitlines(), name)
    _check_rules(grammar, name)
    if found := _OPTIONS.search(grammar):
        raise EdgespecError(
            f"{name} uses {found[1]}=, which is not supported: limit the whole answer instead"
        )
    return grammar


def gbnf(grammar: str) -> str:
    """Convert a llama.cpp grammar to Lark. Raises EdgespecError if that is impossible.

    Rules that are not recursive become terminals, which match greedily, as in a lexer: where a rule could end
    early because of the next one, llama.cpp allows more texts than this.
    """
    _check_size(grammar.splitlines(), "the grammar")
    # Imported late, because it is rarely used.
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if not re.search(r"^\s*root\s*::=", grammar, re.MULTILINE):
        raise EdgespecError("the grammar has no rule named root: add one")
    if unknown := _TOKEN.search(_QUOTED.sub("", grammar)):
        raise EdgespecError(f"the grammar contains the token {unknown[0]}: use its text instead")
    try:
        return lark(gbnf_to_lark(_ESCAPES.sub(_character, grammar)))
    except EdgespecError:
        raise
    except RecursionError:
        raise EdgespecError("the grammar is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - the converter raises bare exceptions
        raise EdgespecError(f"the grammar is not valid GBNF: {shown(str(error))}") from None


def shown(text: str) -> str:
    """Return the first line of a library's message, printable and without a full stop."""
    line = text.strip().splitlines()[0] if text.strip() else "unknown reason"
    return "".join(c if c.isprintable() else " " for c in line)[:200].removesuffix(".")


def _character(escape: re.Match[str]) -> str:
    """Return the character of an escape, or an escape that the converter supports."""
    code = escape[1] or escape[2] or escape[3]
    if not code or int(code, 16) > 0x10FFFF:
        return escape[0]
    character = chr(int(code, 16))
    return character if character > "\x7f" or character.isalnum() else f"\\x{ord(character):02x}"


def _check_size(value: Any, name: str) -> None:
    """Raise EdgespecError if `value` is too large, too deep or not Unicode, without recursion."""
    left, characters = [(value, 1)], 0
    while left:
        item, depth = left.pop()
        if depth > _MOST_NESTED:
            raise EdgespecError(f"{name} is nested more than {_MOST_NESTED} deep")
        if isinstance(item, Mapping):
            left.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple):
            left.extend((part, depth + 1) for part in item)
        elif isinstance(item, str):
            characters += len(item)
            if len(item) > _MOST_IN_ONE:
                raise EdgespecError(
                    f"{name} contains a text of {len(item)} characters: at most {_MOST_IN_ONE}"
                )
            if not _is_unicode(item):
                raise EdgespecError(f"{name} contains half a character (a lone surrogate)")
        characters += 2
        if characters > _MOST_CHARACTERS:
            raise EdgespecError(f"{name} is larger than {_MOST_CHARACTERS // 1024} KiB")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_repetition(pattern: str, name: str) -> None:
    _check_added(_added(pattern), name)


def _check_added(added: int, name: str) -> None:
    if added > _MOST_REPEATED:
        raise EdgespecError(
            f"{name} repeats more than {_MOST_REPEATED} symbols by count: use * or +, or smaller counts"
        )


def _added(
    pattern: str, parts: re.Pattern[str] = _PARTS, weigh: Callable[[str], int] = lambda _part: 1
) -> int:
    """Return the number of symbols that `pattern` gains when its counted repetitions are expanded.

    Matching takes quadratic time in that number. `weigh` returns the number of symbols of a part that is
    neither a count nor a parenthesis.
    """
    weights, last, plain = [0], 0, 0  # symbols of open groups, of the previous part, without expansion
    for part in parts.finditer(pattern):
        if counts := [int(n) for n in part.groups() if n]:
            weights[-1] += last * (max(counts) - 1)
            last *= max(counts)
        elif part[0] == "(":
            weights.append(0)
        elif part[0] == ")" and len(weights) > 1:
            last = weights.pop()
            weights[-1] += last
        else:
            last = weigh(part[0])
            plain += 1
            weights[-1] += last
    return sum(weights) - plain


def _check_rules(grammar: str, name: str) -> None:
    """Check the repetitions in the rules of a Lark grammar, each with the rules it refers to."""
    bodies: dict[str, str] = {}
    rule = ""
    for line in grammar.splitlines():
        if header := _RULE.match(line):
            rule, line = header[1], line[header.end() :]
        bodies[rule] = bodies.get(rule, "") + "\n" + line
    known: dict[str, int] = {}

    def weigh(part: str) -> int:
        if part.startswith("/") and len(part) > 1:
            return 1 + _added(part)
        if part in bodies and part not in known:
            known[part] = 1  # for recursive rules
            known[part] += _added(bodies[part], _RULE_PARTS, weigh)
        return known.get(part, 1)

    try:
        for rule in bodies:
            _check_added(weigh(rule), name)
    except RecursionError:
        raise EdgespecError(f"{name} has a chain of rules that is too long") from None


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield `schema` and every schema within it, but not values such as in an enum."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key in MAPS:
        if isinstance(parts := schema.get(key), Mapping):
            for part in parts.values():
                yield from _schemas(part)
    for key in ONES:
        yield from _schemas(schema.get(key))
    for key in LISTS:
        if isinstance(parts := schema.get(key), list | tuple):
            for part in parts:
                yield from _schemas(part)


def _check(schema: Mapping[str, Any], name: str) -> None:
    patterns = [schema.get("pattern"), *_keys(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str):
            _check_repetition(pattern, f"{name}'s pattern")
    if len(_keys(schema.get("properties"))) > _MOST_PROPERTIES:
        raise EdgespecError(f"{name} has an object with more than {_MOST_PROPERTIES} properties")
    step = schema.get("multipleOf")
    if isinstance(step, int | float) and _digits(step) > _MOST_STATES:
        raise EdgespecError(f"{name} has multipleOf {step}: at most {_MOST_STATES} without the decimal point")


def _keys(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, Mapping) else []


def _digits(number: float) -> int:
    """Return the digits of `number` as an integer, without the decimal point."""
    digits = Decimal(str(number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)))


def _mapped(
    schema: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return `schema` with `change` applied to it and to every schema within it."""

    def part(value: Any) -> Any:
        return _mapped(value, change) if isinstance(value, Mapping) else value

    result = change(schema)
    for key in MAPS:
        if isinstance(parts := schema.get(key), Mapping):
            result[key] = {name: part(value) for name, value in parts.items()}
    for key in ONES:
        if key in schema:
            result[key] = part(schema[key])
    for key in LISTS:
        if isinstance(parts := schema.get(key), list | tuple):
            result[key] = [part(value) for value in parts]
    return result


def _rewritten(schema: Mapping[str, Any], close: bool) -> dict[str, Any]:
    """Return one schema without unknown formats and, if `close`, without additional properties."""
    result = dict(schema)
    if "format" in schema and schema["format"] not in _FORMATS:
        del result["format"]
    names = schema.get("properties")
    others = ("additionalProperties", "patternProperties")
    if close and isinstance(names, Mapping) and names and not any(key in schema for key in others):
        required = schema.get("required")
        if not isinstance(required, list) or all(isinstance(r, str) and r in names for r in required):
            result["additionalProperties"] = False
    return result
