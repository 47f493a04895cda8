"""JSON schemas as Lark rules, with whole numbers above 2^53 as the text that they are.

The grammar library compiles schemas itself, but computes in doubles. Where a schema has numbers that these do
not hold, the objects, lists and alternatives around them become rules of ours; all else stays the library's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from edgespec.core import EdgespecError
from edgespec.models.prompting.grammar_sources import Schema, choices, json_schema, literal
from edgespec.models.prompting.schema_numbers import MOST, has_inexact

_MOST_PARTS, _MOST_NESTED = 5000, 100
_LARGEST = 10**40
_ROOT = {"$schema", "$id", "$comment", "$defs", "definitions"}
_WORDS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "format"}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KNOWN = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "integer": {*_BOUNDS},
}


def json_rule(rule: str, schema: Schema, name: str = "the schema", *, strict: bool = True) -> str:
    """Return Lark rules, the first of which is `rule`, for texts that keep to `schema`: see `json_schema`.

    Raises EdgespecError, which begins with `name`, if it is no schema or cannot be kept.
    """
    checked = json_schema(schema, name, strict=False)  # its size, before anything recursive
    if isinstance(schema, Mapping) and _is_inexact(schema, schema):
        try:
            return _Rules(rule, schema, name, strict).text
        except NotImplementedError:
            pass  # json_schema says what it means for this schema
    return f"{rule}: %json {json.dumps(json_schema(schema, name, strict=True) if strict else checked)}"


def has_exact_rules(schema: Schema) -> bool:
    """Whether a schema has numbers that the library would change."""
    return isinstance(schema, Mapping) and _is_inexact(schema, schema)


def either(form: tuple[str, Any], calls: str) -> str:
    """Return a Lark grammar of what is in the format `form`, or follows the Lark grammar `calls`.

    Raises EdgespecError for a format that cannot be combined.
    """
    kind, source = form
    match kind:
        case "json_object":
            answer = json_rule("answer", {"type": "object"})
        case "json_schema":
            answer = json_rule("answer", source, strict=False)
        case "choice":
            answer = f"answer: {choices(source).removeprefix('start: ')}"
        case _:
            raise EdgespecError(
                f"a grammar of kind {kind} together with tools is not supported: use a schema"
            )
    return f"start: answer | calls\n{answer}\n" + calls.replace("start:", "calls:", 1)


class _Rules:
    """The rules of one schema. Raises NotImplementedError for keywords that stand around such numbers."""

    def __init__(self, rule: str, schema: Mapping[str, Any], name: str, strict: bool) -> None:
        self._prefix, self._root, self._name, self._strict = rule, schema, name, strict
        self._lines: list[str] = []
        self._count = 0
        self._known: dict[str, str] = {}  # rules of definitions, by reference
        self._shared = {
            key: {one: part for one, part in schema[key].items() if not _is_inexact(part, schema)}
            for key in ("$defs", "definitions")
            if isinstance(schema.get(key), Mapping)
        }
        start = self._rule(schema)
        self.text = "\n".join([f"{rule}: {start}", *self._lines])

    def _rule(self, schema: Any) -> str:
        """Add the rules of `schema` and return the name of the first."""
        if not isinstance(schema, Mapping) or not _is_inexact(schema, self._root):
            whole = {**schema, **self._shared} if isinstance(schema, Mapping) else schema
            return self._add(f"%json {json.dumps(json_schema(whole, self._name, strict=self._strict))}")
        if isinstance(reference := schema.get("$ref"), str):
            _only(schema, {"$ref"})
            if reference not in self._known:
                self._known[reference] = named = self._next()
                self._lines.append(f"{named}: {self._rule(_resolved(reference, self._root))}")
            return self._known[reference]
        if "enum" in schema or "const" in schema:
            _only(schema, {"enum", "const", "type"})
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            return self._add(" | ".join(literal(json.dumps(one, ensure_ascii=False)) for one in values))
        for key in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list):
                _only(schema, {key})
                return self._add(" | ".join(self._rule(part) for part in parts))
        kind = schema.get("type")
        if kind == "integer":
            _only(schema, _KNOWN["integer"] | {"type"})
            return self._add(f"/{_range(*_bounds(schema))}/")
        if kind == "array":
            _only(schema, _KNOWN["array"] | {"type"})
            return self._list(schema)
        if kind == "object" or (kind is None and "properties" in schema):
            _only(schema, _KNOWN["object"] | {"type"})
            return self._object(schema)
        raise NotImplementedError

    def _list(self, schema: Mapping[str, Any]) -> str:
        item, least, most = self._rule(schema["items"]), schema.get("minItems", 0), schema.get("maxItems")
        if type(least) is not int or not 0 <= least <= 1 or most is not None:
            raise NotImplementedError
        filled = f'{item} (", " {item})*'
        return self._add(f'"[" {filled} "]"' if least else f'"[" ({filled})? "]"')

    def _object(self, schema: Mapping[str, Any]) -> str:
        """Add rules for the properties in order: `begun` ones after another property, and `first` ones."""
        properties, required = schema.get("properties"), schema.get("required", [])
        if schema.get("additionalProperties", False) is not False or not isinstance(properties, Mapping):
            raise NotImplementedError
        if not isinstance(required, list) or not all(one in properties for one in required):
            raise NotImplementedError
        begun = first = self._add('""')
        for name, part in reversed(list(properties.items())):
            pair = f"{literal(json.dumps(str(name), ensure_ascii=False) + ': ')} {self._rule(part)}"
            optional = name not in required
            first, begun = (
                self._add(f"{pair} {begun}" + (f" | {first}" if optional else "")),
                self._add(f'", " {pair} {begun}' + (f" | {begun}" if optional else "")),
            )
        return self._add(f'"{{" {first} "}}"')

    def _add(self, body: str) -> str:
        name = self._next()
        self._lines.append(f"{name}: {body}")
        return name

    def _next(self) -> str:
        self._count += 1
        return f"{self._prefix}_x{self._count}"


def _only(schema: Mapping[str, Any], keys: set[str]) -> None:
    if not schema.keys() <= keys | _ROOT | _WORDS:
        raise NotImplementedError


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """Return the definition that a reference within the document names."""
    _, _, path = reference.partition("#/")
    found: Any = root
    for part in path.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _is_inexact(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether `schema`, or what it refers to, has numbers that doubles do not hold; not for large ones."""
    left, references, visited = [(schema, 0)], set[str](), 0
    while left:
        part, depth = left.pop()
        if not isinstance(part, Mapping):
            continue
        visited += 1
        if visited > _MOST_PARTS or depth > _MOST_NESTED:
            return False
        if any(has_inexact(part[key]) for key in ("enum", "const", *_BOUNDS) if key in part):
            return True
        left.extend((inner, depth + 1) for inner in _inner(part))
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/") and reference not in references:
            references.add(reference)
            left.append((_resolved(reference, root), depth + 1))
    return False


def _inner(schema: Mapping[str, Any]) -> Iterator[Any]:
    if isinstance(properties := schema.get("properties"), Mapping):
        yield from properties.values()
    yield schema.get("items")
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list):
            yield from parts


def _bounds(schema: Mapping[str, Any]) -> tuple[int, int]:
    """Return the smallest and the largest integer, of 64 bits where there is no bound."""
    given = {key: schema[key] for key in _BOUNDS if key in schema}
    if any(type(value) is not int or abs(value) > _LARGEST for value in given.values()):
        raise NotImplementedError
    least = [given["minimum"]] if "minimum" in given else []
    least += [given["exclusiveMinimum"] + 1] if "exclusiveMinimum" in given else []
    most = [given["maximum"]] if "maximum" in given else []
    most += [given["exclusiveMaximum"] - 1] if "exclusiveMaximum" in given else []
    found = max(least, default=-MOST), min(most, default=MOST)
    if found[0] > found[1]:
        raise NotImplementedError
    return found


def _range(least: int, most: int) -> str:
    """Return a regular expression of the whole numbers from `least` to `most`."""
    parts = []
    if least < 0:
        parts.append(f"-({_natural(max(1, -most), -least)})")
    if most >= 0:
        parts.append(_natural(max(0, least), most))
    return "|".join(parts)


def _natural(least: int, most: int) -> str:
    found = []
    for length in range(len(str(least)), len(str(most)) + 1):
        low = max(least, 10 ** (length - 1) if length > 1 else 0)
        high = min(most, 10**length - 1)
        found.append(_digits(str(low), str(high)))
    return "|".join(found)


def _digits(low: str, high: str) -> str:
    """Return a regular expression of the numbers between two of equally many digits."""
    if low == high:
        return low
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return f"[{low[0]}-{high[0]}]" + (f"[0-9]{{{rest}}}" if rest else "")
    if low[0] == high[0]:
        return f"{low[0]}({_digits(low[1:], high[1:])})"
    found = [f"{low[0]}({_digits(low[1:], '9' * rest)})"]
    if int(high[0]) - int(low[0]) > 1:
        found.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}][0-9]{{{rest}}}")
    return "|".join([*found, f"{high[0]}({_digits('0' * rest, high[1:])})"])
