"""Schemas that a grammar cannot keep as a whole: what can be kept of them, or which part cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from edgespec.models.prompting.grammar_sources import LISTS, MAPS, ONES, Schema

SchemaRefusal = Callable[[Schema], str | None]
"""Returns why a schema cannot be compiled, None if it can."""

_MOST_TRIALS, _MOST_SECONDS = 400, 5.0
# In this order, until the rest can be kept. `type`, `properties`, `items` and `enum` go last.
_DROPPED = (
    "pattern", "format", "propertyNames", "patternProperties", "uniqueItems", "contains", "minContains",
    "maxContains", "dependentRequired", "dependentSchemas", "if", "then", "else", "not",
    "unevaluatedProperties", "unevaluatedItems", "multipleOf", "exclusiveMinimum", "exclusiveMaximum",
    "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties",
    "maxProperties", "$ref", "const", "oneOf", "allOf", "anyOf", "additionalProperties", "required",
    "enum", "items", "prefixItems", "properties", "type",
)  # fmt: skip


def loosened(schema: Schema, refusal: SchemaRefusal) -> Schema:
    """Return `schema` without what `refusal` refuses: each part that can be kept stays.

    Parts are tried alone, so the time grows with their number; beyond a limit, any object is allowed.
    """
    return _Loosener(schema, refusal).result


def fault(schema: Schema, refusal: SchemaRefusal) -> tuple[str, str]:
    """Return the path of the smallest part that is refused (`address.zip`, `tags[]`), and the reason."""
    path, part, reason = "", schema, refusal(schema) or ""
    shared = _definitions(schema)
    while True:
        for name, child in _parts(part):
            if (why := refusal(_with(child, shared))) is not None:
                path, part, reason = _joined(path, name), child, why
                break
        else:
            return path, _cause(part, reason)


class _Loosener:
    def __init__(self, schema: Schema, refusal: SchemaRefusal) -> None:
        self._refusal, self._left, self._until = refusal, _MOST_TRIALS, monotonic() + _MOST_SECONDS
        self._shared = _definitions(schema)
        try:
            if refusal(schema) is not None and isinstance(schema, Mapping):
                for key, parts in self._shared.items():
                    self._shared[key] = {name: self._loose(part) for name, part in parts.items()}
                schema = self._loose({**schema, **self._shared})
            self.result: Schema = schema
        except TimeoutError:
            self.result = {"type": "object"}

    def _loose(self, schema: Any) -> Any:
        if not isinstance(schema, Mapping):
            return schema if isinstance(schema, bool) else {}
        if self._fits(schema):
            return schema
        result = self._with_loose_parts(schema)
        if self._fits(result):
            return result
        for key in _DROPPED:
            without = {name: part for name, part in result.items() if name != key}
            if key in result and self._fits(without):
                return without
        for key in _DROPPED:
            if result.pop(key, None) is not None and self._fits(result):
                return result
        return {}

    def _with_loose_parts(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(schema)
        for key in MAPS:
            if isinstance(parts := schema.get(key), Mapping) and key not in self._shared:
                result[key] = {name: self._loose(part) for name, part in parts.items()}
        for key in ONES:
            if isinstance(schema.get(key), Mapping):
                result[key] = self._loose(schema[key])
        for key in LISTS:
            if isinstance(parts := schema.get(key), list | tuple):
                result[key] = [self._loose(part) for part in parts]
        return result

    def _fits(self, schema: Mapping[str, Any]) -> bool:
        if not self._left or monotonic() > self._until:
            raise TimeoutError
        self._left -= 1
        return self._refusal(_with(schema, self._shared)) is None


def _definitions(schema: Schema) -> dict[str, Any]:
    """Return the parts of `schema` that its other parts refer to."""
    if not isinstance(schema, Mapping):
        return {}
    return {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema.get(key), Mapping)}


def _with(schema: Any, shared: Mapping[str, Any]) -> Any:
    return {**shared, **schema} if isinstance(schema, Mapping) else schema


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly within `schema`, with their places."""
    if not isinstance(schema, Mapping):
        return
    for key in MAPS:
        if isinstance(parts := schema.get(key), Mapping):
            for name, part in parts.items():
                yield str(name) if key == "properties" else f"{key}.{name}", part
    for key in ONES:
        if isinstance(schema.get(key), Mapping):
            yield "[]" if key == "items" else key, schema[key]
    for key in LISTS:
        if isinstance(parts := schema.get(key), list | tuple):
            for i, part in enumerate(parts):
                yield f"{key}[{i}]", part


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and not name.startswith("[") else path + name


def _cause(schema: Any, reason: str) -> str:
    keys: Sequence[str] = list(schema) if isinstance(schema, Mapping) else []
    if "regex parse error" in reason and "pattern" in keys:
        return f"its pattern {str(schema['pattern'])[:80]!r} is more than grammars can follow"
    return reason
