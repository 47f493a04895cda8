"""The base of request bodies, and the fields of a request that no body knows."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from edgespec.app.serve.apis.errors import ApiError
from edgespec.text import printable

_LOG = logging.getLogger("edgespec")
_MOST_LINES = 1000
_INDEX = re.compile(r"\[\d+\]")
_PRODUCT = re.compile(r"[^\s/]+(?:/[A-Za-z][^\s/]*)?")  # without its version


class Body(BaseModel):
    """A part of a request.

    Fields that are null are absent, at any depth. So are those in `may_be_minus_one` that are -1, which many
    clients send for "no bound". Unknown fields are allowed: see `UnknownFields`; those of a body that does
    not `counts_unknown` are its content.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())
    may_be_minus_one: ClassVar[frozenset[str]] = frozenset()
    counts_unknown: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        none = cls.may_be_minus_one
        return {
            name: one
            for name, one in value.items()
            if one is not None and not (name in none and type(one) is int and one == -1)
        }


def unset(body: Body, **values: float | None) -> frozenset[str]:
    """Return the names of the settings of sampling that `body` leaves open; `values` replace its own."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return frozenset(one for one in names if values.get(one, getattr(body, one, None)) is None)


def template_variables(body: Body) -> dict[str, Any]:
    """Return what `body` says of reasoning as the variables that chat templates have for it.

    Templates differ in names: `enable_thinking` (Qwen, GLM), `thinking` (DeepSeek), `reasoning_effort`
    (gpt-oss). `chat_template_kwargs` take precedence.
    """
    found: dict[str, Any] = {}
    thinks = getattr(body, "enable_thinking", None)
    given, reasoning = getattr(body, "thinking", None), getattr(body, "reasoning", None)
    effort = getattr(body, "reasoning_effort", None)
    if isinstance(given, bool):
        thinks = given
    elif isinstance(given, dict) and isinstance(given.get("type"), str):
        thinks = given["type"] != "disabled"
    if isinstance(reasoning, dict):
        effort = reasoning.get("effort", effort)
    if isinstance(effort, str):
        if effort == "none":
            thinks = False
        else:
            found["reasoning_effort"] = effort
    if thinks is not None:
        found |= {"enable_thinking": thinks, "thinking": thinks}
    return found | (getattr(body, "chat_template_kwargs", None) or {})


class UnknownFields:
    """What happens to fields that no body has: they are counted and ignored, or refused if `strict`."""

    def __init__(self, count: Callable[[str], None], *, strict: bool = False) -> None:
        """`count` is called with the path of each ignored field, `messages[].name`."""
        self._count, self._strict = count, strict
        self._logged: set[tuple[str, str]] = set()

    def check(self, body: Body, user_agent: str) -> None:
        """Log each field once for each client. Raises ApiError if `strict` and there is an unknown field."""
        for path in _unknown(body):
            if self._strict:
                message = f"Unrecognized request argument supplied: {printable(path)}"
                raise ApiError(400, message, param=path[:300], code="unknown_parameter")
            field = printable(_INDEX.sub("[]", path), 100)
            self._count(field)
            found = _PRODUCT.match(user_agent)
            field_and_client = (field, printable(found[0], 60) if found else "a client without a name")
            if field_and_client not in self._logged and len(self._logged) < _MOST_LINES:
                self._logged.add(field_and_client)
                _LOG.warning("edgespec: ignored the unknown field %s of %s", *field_and_client)


def _unknown(body: Body, path: str = "") -> Iterator[str]:
    """Yield the paths of all fields that are not declared."""
    if not body.counts_unknown:
        return
    for name in body.model_extra or ():
        yield path + name
    for name, about in type(body).model_fields.items():
        place = path + (about.alias or name)
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _unknown(value, place + ".")
        elif isinstance(value, list):
            for i, one in enumerate(value):
                if isinstance(one, Body):
                    yield from _unknown(one, f"{place}[{i}].")
