"""Whether a value has the structure that a JSON schema describes.

Looks at types, enums, constants, members and items; bounds, patterns and formats are left to the client.
Nothing here takes longer than the value and the schema are large, whatever is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "object": dict, "array": list, "boolean": bool, "null": type(None), "number": (int, float),
}  # fmt: skip
_MOST_NESTED = 100


def fits(value: Any, schema: Any, root: Any = None, depth: int = 0) -> bool:
    """Return whether `value` fits `schema`, whose references point into `root`."""
    if not isinstance(schema, Mapping):
        return schema is not False
    if depth > _MOST_NESTED:
        return False
    root = schema if root is None else root

    def inner(one: Any, part: Any) -> bool:
        return fits(one, part, root, depth + 1)

    if "$ref" in schema and not inner(value, _target(schema["$ref"], root)):
        return False
    if "type" in schema and not any(_is(value, kind) for kind in _listed(schema["type"])):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "enum" in schema and not any(_same(value, one) for one in _listed(schema["enum"])):
        return False
    for key, needed in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        if key in schema and not needed(inner(value, part) for part in _listed(schema[key])):
            return False
    if isinstance(value, dict):
        return _members_fit(value, schema, inner)
    if isinstance(value, list) and "items" in schema and "prefixItems" not in schema:
        return all(inner(one, schema["items"]) for one in value)
    return True


def _members_fit(value: dict[str, Any], schema: Mapping[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    if not all(key in value for key in _listed(schema.get("required", []))):
        return False
    rest = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    return all(inner(one, properties.get(key, rest)) for key, one in value.items())


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return bool(kind == "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(kind, str) and isinstance(value, _TYPES.get(kind, ()))


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _target(reference: Any, root: Any) -> Any:
    """Return the part of `root` that a reference names, True (anything) for one that is not in it."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return True
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        root = root.get(key, True) if isinstance(root, Mapping) else True
    return root
