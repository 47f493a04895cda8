"""Whole numbers in JSON schemas that the grammar library, which computes in doubles, would change.

Above 2^53 not every whole number is a double. Bounds are moved to the next double inside, so that nothing
outside of them is ever written; values that must be written exactly are refused, or left to the client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgespec.core import EdgespecError

_EXACT = 2**53
MOST = 2**63 - 1024
"""The largest double that is a signed integer of 64 bits: the bound of integers that have no other."""


def exact_numbers(schema: Mapping[str, Any], name: str, strict: bool) -> dict[str, Any]:
    """Return one schema, without those inside it, with numbers that doubles hold.

    Integers get bounds of 64 bits where they have none, without which a model may write digits without end.
    Raises EdgespecError, which begins with `name`, if `strict` and a number cannot be kept exactly.
    """
    result = dict(schema)
    for key in ("enum", "const"):
        values = schema.get(key) if key == "enum" else [schema.get(key)]
        if not isinstance(values, list) or not any(map(has_inexact, values)):
            continue
        if strict:
            raise EdgespecError(f"{name} has {key} with whole numbers above 2^53, which grammars cannot hold")
        del result[key]
        if "type" not in result and all(type(value) is int for value in values):
            result["type"] = "integer"
    kinds = result.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "integer" not in kinds or "number" in kinds or "enum" in result or "const" in result:
        return result
    return _bounded(result, name, strict)


def _bounded(schema: dict[str, Any], name: str, strict: bool) -> dict[str, Any]:
    least, most = schema.get("minimum"), schema.get("maximum")
    if type(above := schema.get("exclusiveMinimum")) is int and abs(above) >= _EXACT:
        least = max(above + 1, least) if type(least) is int else above + 1
        del schema["exclusiveMinimum"]
    if type(below := schema.get("exclusiveMaximum")) is int and abs(below) >= _EXACT:
        most = min(below - 1, most) if type(most) is int else below - 1
        del schema["exclusiveMaximum"]
    if type(least) is int and abs(least) > _EXACT:
        schema["minimum"] = least = _inside(least, math.inf)
    if type(most) is int and abs(most) > _EXACT:
        schema["maximum"] = most = _inside(most, -math.inf)
    if type(least) is int and type(most) is int and least > most and max(abs(least), abs(most)) > _EXACT:
        if strict:
            raise EdgespecError(f"{name} has bounds above 2^53 with nothing between that grammars can hold")
        del schema["minimum"], schema["maximum"]
    if "multipleOf" not in schema:
        if "minimum" not in schema and "exclusiveMinimum" not in schema:
            schema["minimum"] = -MOST
        if "maximum" not in schema and "exclusiveMaximum" not in schema:
            schema["maximum"] = MOST
    return schema


def _inside(bound: int, towards: float) -> int:
    """Return the double nearest to `bound` on the side of `towards`, of 64 bits as an integer."""
    if abs(bound) >= MOST:
        return MOST if bound > 0 else -MOST
    near = float(bound)
    if (near < bound) if towards > 0 else (near > bound):
        near = math.nextafter(near, towards)
    return int(near)


def has_inexact(value: Any) -> bool:
    """Whether a JSON value is, or contains, a whole number that is no double of 64 bits as an integer."""
    if isinstance(value, Mapping):
        return any(map(has_inexact, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_inexact, value))
    if type(value) is not int or abs(value) <= _EXACT:
        return False
    return abs(value) > MOST or int(float(value)) != value
