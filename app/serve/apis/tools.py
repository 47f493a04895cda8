"""Tools of requests: which are offered to the model, and which one it has to call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Discriminator, Tag

from edgespec.app.serve.apis.body import Body
from edgespec.models.prompting.tool_calls import ToolChoice

_CUSTOM = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""Parameters of a function in place of a custom tool, whose input is a text."""

_MODES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"] = "function"
    function: Function


class Custom(Body):
    """A tool that takes a text. What `format` says of the text goes into the description."""

    name: str
    description: str | None = None
    format: dict[str, Any] | None = None


class CustomTool(Body):
    type: Literal["custom"]
    custom: Custom


class OtherTool(Body):
    """A tool of another kind (`web_search`, `namespace`, `mcp`): it is left out."""

    counts_unknown: ClassVar[bool] = False

    type: str


def kind_of_tool(tool: Any) -> str | None:
    """Return the tag of a tool in a union of `function`, `custom` and `other`."""
    given = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    if given is None and isinstance(tool, dict) and "function" in tool:
        return "function"
    if not isinstance(given, str):
        return None
    return given if given in ("function", "custom") else "other"


ChatTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(kind_of_tool),
]


def offered(tools: Iterable[Function | Custom]) -> list[dict[str, Any]]:
    """Return `tools` in the form of chat templates, custom ones as functions with one text argument."""
    return [_offered(tool) for tool in tools]


def read_choice(
    given: str | Mapping[str, Any] | None, tools: Sequence[dict[str, Any]], *, parallel: bool
) -> tuple[ToolChoice, list[dict[str, Any]]]:
    """Return the choice, and which of `tools` it allows. Raises ValueError for one that is unknown."""
    if given is None:
        return ToolChoice("auto" if tools else "none", parallel=parallel), list(tools)
    kind = given if isinstance(given, str) else given.get("type")
    if isinstance(kind, str) and kind in _MODES:
        return ToolChoice(cast(Any, _MODES[kind]), parallel=parallel), list(tools)
    inner = given if isinstance(given, str) else given.get(str(kind), given)
    if isinstance(inner, Mapping) and kind == "allowed_tools" and isinstance(inner.get("tools"), list):
        names = [_name(one) for one in inner["tools"]]
        allowed = [tool for tool in tools if tool["function"]["name"] in names]
        choice, _ = read_choice(inner.get("mode"), allowed, parallel=parallel)
        return choice, allowed
    if kind in ("function", "custom", "tool") and (name := _name(given)) is not None:
        return replace(ToolChoice("required", named=name), parallel=False), list(tools)
    raise ValueError(
        f"tool_choice {str(kind)[:60]!r} is not supported: pass auto, none, required or a function"
    )


def custom_input(arguments: str) -> str:
    """Return the text that a custom tool is called with, as far as it was generated."""
    found = partial_object(arguments).get("input", "")
    return found if isinstance(found, str) else ""


def partial_object(text: str) -> dict[str, Any]:
    """Parse the arguments of a call, as far as they were generated."""
    from pydantic_core import from_json

    try:
        found = from_json(text or "{}", allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(choice: Any) -> str | None:
    """Return the name in {"type": "function", "name": ...} or {..., "function": {"name": ...}}."""
    inner = choice.get(str(choice.get("type")), choice) if isinstance(choice, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) and name else None


def _offered(tool: Function | Custom) -> dict[str, Any]:
    if isinstance(tool, Function):
        function = tool.model_dump(exclude_none=True, include={"name", "description", "parameters", "strict"})
        return {"type": "function", "function": function}
    about = [tool.description or ""]
    if tool.format is not None and tool.format.get("type") == "grammar":
        grammar = tool.format.get("grammar", tool.format)
        if isinstance(grammar, Mapping):
            about.append(f"The input follows this grammar:\n{grammar.get('definition', '')}")
    description = "\n\n".join(one for one in about if one)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": description, "parameters": _CUSTOM},
    }
