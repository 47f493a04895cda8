"""What a text is asked to keep to, made ready for the grammar library: checked, bounded, put into its words.

Schemas and grammars come from anyone who may send a request. The library bounds its own work well, so what is
refused here is only what it was seen to spend seconds or more on, and each refusal names its cause.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from edgespec.core import EdgespecError

Schema = Mapping[str, Any] | bool
"""A JSON schema (draft 2020-12), as json.loads gives it."""

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: on one line, with the separators of Python's json.dumps. Models write it that way, and
with one way to write it most of what is not a value is forced."""

_MOST_CHARACTERS = 512 * 1024
_MOST_IN_ONE = 16 * 1024  # characters of one string: what is forced is looked at anew for each of its tokens
_MOST_NESTED = 100
_MOST_PROPERTIES = 1000  # of one object
_MOST_REPEATED = 2000  # symbols of a regular expression with its counted repetitions written out
_MOST_STATES = 10_000  # of multipleOf: one for each remainder
_FORMATS = {
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
}  # fmt: skip
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_ONES = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames",
    "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MIXED = {"$ref", "anyOf", "dependentSchemas", "if", "not", "oneOf", "unevaluatedProperties"}
# Of a regular expression: what counts the symbol before it ({3}, {3,}, {,3}, {3,5}), or a symbol: a class of
# characters, an escaped one, any other. Lark also counts with ~3 and ~3..5.
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
    """The value of a JSON text. Raises EdgespecError, which calls it `name`, for anything else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise EdgespecError(f"{name} is nested too deeply.") from None
    except ValueError as error:
        raise EdgespecError(f"{name} is not valid JSON: {error}.") from None


def json_schema(schema: Schema | str, name: str = "The schema", *, strict: bool = True) -> dict[str, Any]:
    """`schema` for the library: bounded, laid out as LAYOUT says.

    Objects that name their properties and do not speak of others have no others: what is written is valid
    either way, and a model is not tempted to invent. That is left alone where schemas are combined, since
    there one may speak of what another one names. Formats nobody knows are ignored, as the specification
    asks. If not `strict`, so is whatever else the library cannot enforce.

    Raises EdgespecError for what is no schema and for what would take too long.
    """
    value = read_json(schema, name) if isinstance(schema, str) else schema
    if not isinstance(value, bool | Mapping):
        raise EdgespecError(f"{name} must be a JSON object, not {type(value).__name__}.")
    _check_size(value, name)
    if isinstance(value, bool):
        value = {} if value else {"not": {}}
    for one in _schemas(value):
        _check(one, name)
    together = any("allOf" in one or ("properties" in one and _MIXED & one.keys()) for one in _schemas(value))
    return {**_rewritten(value, not together), "x-guidance": {**LAYOUT, "lenient": not strict}}


def choices(options: Sequence[str]) -> str:
    """A Lark grammar of these texts. Raises EdgespecError for none, and for empty ones."""
    if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
        raise EdgespecError("A choice needs a list of texts, none of them empty.")
    _check_size(list(options), "The choice")
    return "start: " + " | ".join(map(literal, dict.fromkeys(options)))


def literal(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """`pattern` if it is bounded, else EdgespecError."""
    _check_size(pattern, "The regular expression")
    _check_repetition(pattern, "The regular expression")
    return pattern


def lark(grammar: str, name: str = "The grammar") -> str:
    """`grammar` if it is bounded and never takes back what was written, else EdgespecError."""
    _check_size(grammar.splitlines(), name)
    _check_rules(grammar, name)
    if found := _OPTIONS.search(grammar):
        raise EdgespecError(f"{name} uses {found[1]}=, which is not supported: bound the whole answer.")
    return grammar


def gbnf(grammar: str) -> str:
    """A llama.cpp grammar as Lark. Raises EdgespecError where it cannot be one.

    Rules that do not recur become terminals, which match as much as they can, as a lexer's do: where a rule
    could end early for the sake of what follows it, llama.cpp would allow more texts than this does.
    """
    _check_size(grammar.splitlines(), "The grammar")
    # Imported where it is needed: few ask for it.
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if not re.search(r"^\s*root\s*::=", grammar, re.MULTILINE):
        raise EdgespecError("The grammar has no rule named root.")
    if unknown := _TOKEN.search(_QUOTED.sub("", grammar)):
        raise EdgespecError(f"The grammar names the token {unknown[0]}: write its text instead.")
    try:
        return lark(gbnf_to_lark(_ESCAPES.sub(_character, grammar)))
    except EdgespecError:
        raise
    except RecursionError:
        raise EdgespecError("The grammar is nested too deeply.") from None
    except Exception as error:  # noqa: BLE001 - the converter raises bare exceptions
        raise EdgespecError(f"The grammar is not valid GBNF: {shown(str(error))}.") from None


def shown(text: str) -> str:
    """The first line of a library's message, for one line of ours."""
    line = text.strip().splitlines()[0] if text.strip() else "unknown reason"
    return "".join(c if c.isprintable() else " " for c in line)[:200].removesuffix(".")


def _character(escape: re.Match[str]) -> str:
    """An escape that the converter does not know, as the character itself or an escape that it knows."""
    code = escape[1] or escape[2] or escape[3]
    if not code or int(code, 16) > 0x10FFFF:
        return escape[0]
    character = chr(int(code, 16))
    return character if character > "\x7f" or character.isalnum() else f"\\x{ord(character):02x}"


def _check_size(value: Any, name: str) -> None:
    """Refuse what is too large, too deep, or not text, without recursing into it."""
    left, characters = [(value, 1)], 0
    while left:
        item, depth = left.pop()
        if depth > _MOST_NESTED:
            raise EdgespecError(f"{name} is nested more than {_MOST_NESTED} deep.")
        if isinstance(item, Mapping):
            left.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple):
            left.extend((part, depth + 1) for part in item)
        elif isinstance(item, str):
            characters += len(item)
            if len(item) > _MOST_IN_ONE:
                raise EdgespecError(f"{name} holds a text of {len(item)} characters: at most {_MOST_IN_ONE}.")
            if not _is_unicode(item):
                raise EdgespecError(f"{name} holds half a character (a lone surrogate).")
        characters += 2
        if characters > _MOST_CHARACTERS:
            raise EdgespecError(f"{name} is larger than {_MOST_CHARACTERS // 1024} KiB.")


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
            f"{name} repeats more than {_MOST_REPEATED} symbols by count: use * or +, or smaller counts."
        )


def _added(
    pattern: str, parts: re.Pattern[str] = _PARTS, weigh: Callable[[str], int] = lambda _part: 1
) -> int:
    """How many symbols `pattern` gains when its counted repetitions are written out.

    Matching a long one takes time in its square. `weigh` says how many symbols a part stands for that is
    neither a count nor a parenthesis.
    """
    weights, last, plain = [0], 0, 0  # symbols of the groups that are open, of what was read last, as written
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
    """The same for the rules of a Lark grammar, each with those it refers to."""
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
            known[part] = 1  # where it recurs
            known[part] += _added(bodies[part], _RULE_PARTS, weigh)
        return known.get(part, 1)

    try:
        for rule in bodies:
            _check_added(weigh(rule), name)
    except RecursionError:
        raise EdgespecError(f"{name} has too long a chain of rules.") from None


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every schema within `schema`, itself first; not what merely looks like one, as in an enum."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key in _MAPS:
        if isinstance(parts := schema.get(key), Mapping):
            for part in parts.values():
                yield from _schemas(part)
    for key in _ONES:
        yield from _schemas(schema.get(key))
    for key in _LISTS:
        if isinstance(parts := schema.get(key), list | tuple):
            for part in parts:
                yield from _schemas(part)


def _check(schema: Mapping[str, Any], name: str) -> None:
    patterns = [schema.get("pattern"), *_keys(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str):
            _check_repetition(pattern, f"{name}'s pattern")
    if len(_keys(schema.get("properties"))) > _MOST_PROPERTIES:
        raise EdgespecError(f"{name} has an object with more than {_MOST_PROPERTIES} properties.")
    step = schema.get("multipleOf")
    if isinstance(step, int | float) and _digits(step) > _MOST_STATES:
        raise EdgespecError(f"{name} asks for a multiple of {step}: at most {_MOST_STATES}, its point aside.")


def _keys(value: Any) -> Sequence[Any]:
    return list(value) if isinstance(value, Mapping) else []


def _digits(number: float) -> int:
    """The digits of `number` as a whole number, without its point."""
    digits = Decimal(str(number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)))


def _rewritten(schema: Mapping[str, Any], close: bool) -> dict[str, Any]:
    """`schema` with its objects closed, where `close` says so, and without unknown formats."""

    def part(value: Any) -> Any:
        return _rewritten(value, close) if isinstance(value, Mapping) else value

    result = dict(schema)
    for key in _MAPS:
        if isinstance(parts := schema.get(key), Mapping):
            result[key] = {name: part(value) for name, value in parts.items()}
    for key in _ONES:
        if key in schema:
            result[key] = part(schema[key])
    for key in _LISTS:
        if isinstance(parts := schema.get(key), list | tuple):
            result[key] = [part(value) for value in parts]
    if "format" in schema and schema["format"] not in _FORMATS:
        del result["format"]
    names = schema.get("properties")
    others = ("additionalProperties", "patternProperties")
    if close and isinstance(names, Mapping) and names and not any(key in schema for key in others):
        required = schema.get("required")
        if not isinstance(required, list) or all(isinstance(r, str) and r in names for r in required):
            result["additionalProperties"] = False
    return result
