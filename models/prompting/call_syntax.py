"""How model families write tool calls: a table of syntaxes, and which of them a chat template shows.

A call is `open`, its name and arguments in one of four forms, and `shut`. The grammar, the parser and the
text of calls are derived from that. A family is chosen by marks in its template, never by a model's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgespec.models.prompting.call_forms import (
    CallForm,
    JsonCall,
    ListedCall,
    NamedCall,
    Syntax,
    TaggedCall,
)

HERMES = Syntax("hermes", "<tool_call>", "<tool_call>\n", "\n</tool_call>", between="\n")
GENERIC = Syntax("generic", "<tool_call>", "<tool_call>\n", "\n</tool_call>", between="\n", taught=True)
LLAMA = Syntax(
    "llama", "{", "", "", JsonCall(arguments="parameters"), alone=True, many=False, extra="<|python_tag|>"
)


def _listed(family: str, begin: str, close: str = "", form: CallForm | None = None) -> Syntax:
    """Return a syntax of a JSON list of calls after `begin`."""
    trigger = begin.split("\n")[0]
    form = form or JsonCall()
    return Syntax(family, trigger, "", "", form, begin=begin, between=", ", close=close, listed=True)


def _keyed(family: str, open_: str, shut: str, begin: str = "", close: str = "", suffix: str = "") -> Syntax:
    """Return a syntax of calls whose arguments stand in pairs of tags, <arg_key> and <arg_value>."""
    form = TaggedCall(
        f"<tool_sep{suffix}>\n" if suffix else "\n",
        f"<arg_key{suffix}>",
        f"</arg_key{suffix}>",
        f"\n<arg_value{suffix}>",
        f"</arg_value{suffix}>\n",
    )
    trigger = begin.strip() or open_
    return Syntax(family, trigger, open_, shut, form, begin=begin, between="\n", close=close)


def _invoked(family: str, outer: str, mark: str = "", typed: tuple[str, str] = ("", "")) -> Syntax:
    """Return a syntax of <invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>."""
    form = TaggedCall('">\n', f'<{mark}parameter name="', '"', ">", f"</{mark}parameter>\n", typed=typed)
    begin, close = f"<{outer}>\n", f"\n</{outer}>"
    return Syntax(family, f"<{outer}>", f'<{mark}invoke name="', f"</{mark}invoke>", form, begin, "\n", close)


MISTRAL = _listed("mistral", "[TOOL_CALLS]")
MISTRAL_ARGS = Syntax("mistral-args", "[TOOL_CALLS]", "[TOOL_CALLS]", "", NamedCall("[ARGS]"))
QWEN_CODER = Syntax(
    "qwen-coder",
    "<tool_call>",
    "<tool_call>\n<function=",
    "</function>\n</tool_call>",
    TaggedCall(">\n", "<parameter=", ">", "", "</parameter>\n", padded=True),
    between="\n",
)
SEED = Syntax(
    "seed",
    "<seed:tool_call>",
    "<seed:tool_call>\n<function=",
    "</function>\n</seed:tool_call>",
    TaggedCall(">\n", "<parameter=", ">", "", "</parameter>\n"),
    between="\n",
)
GLM = _keyed("glm", "<tool_call>", "</tool_call>")
HUNYUAN = _keyed(
    "hunyuan",
    "<tool_call:opensource>",
    "</tool_call:opensource>",
    "<tool_calls:opensource>\n",
    "\n</tool_calls:opensource>",
    ":opensource",
)
MINIMAX = Syntax(
    "minimax", "<tool_calls>", "", "", begin="<tool_calls>\n", between="\n", close="\n</tool_calls>"
)
MINIMAX_INVOKE = _invoked("minimax-invoke", "minimax:tool_call")
MINIMAX_NESTED = Syntax(
    "minimax-nested",
    "]<]minimax[>[<tool_call>",
    ']<]minimax[>[<invoke name="',
    "]<]minimax[>[</invoke>",
    TaggedCall('">', "]<]minimax[>[<", ">", "", "]<]minimax[>[</{key}>"),
    "]<]minimax[>[<tool_call>\n",
    "\n",
    "\n]<]minimax[>[</tool_call>",
)
_STRING = (' string="true"', ' string="false"')
DSML_CALLS = _invoked("dsml-calls", "\uff5cDSML\uff5ctool_calls", "\uff5cDSML\uff5c", _STRING)
DSML = _invoked("dsml", "\uff5cDSML\uff5cfunction_calls", "\uff5cDSML\uff5c", _STRING)
ATEM = _invoked("atem", "atem:function_calls", "atem:")
MINICPM = Syntax(
    "minicpm",
    "<function name=",
    '<function name="',
    "</function>",
    TaggedCall('">', '<param name="', '"', ">", "</param>"),
    between="\n",
)
KIMI_TAGGED = Syntax(
    "kimi-tagged",
    "<|open|>tools<|sep|>",
    '<|open|>call tool="',
    "<|close|>call<|sep|>",
    TaggedCall(
        '" index="1"<|sep|>',
        '<|open|>argument key="',
        '"',
        "<|sep|>",
        "<|close|>argument<|sep|>",
        typed=(' type="string"', ' type="object"'),
    ),
    begin="<|open|>tools<|sep|>",
    close="<|close|>tools<|sep|>",
)
KIMI = Syntax(
    "kimi",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>functions.",
    "<|tool_call_end|>",
    NamedCall("<|tool_call_argument_begin|>", suffix=":0"),
    begin="<|tool_calls_section_begin|>",
    close="<|tool_calls_section_end|>",
)
_BEGIN, _CLOSE = "<\uff5ctool▁calls▁begin\uff5c>", "<\uff5ctool▁calls▁end\uff5c>"
_OPEN, _SHUT = "<\uff5ctool▁call▁begin\uff5c>", "<\uff5ctool▁call▁end\uff5c>"
DEEPSEEK_FENCED = Syntax(
    "deepseek-fenced",
    _BEGIN,
    f"{_OPEN}function<\uff5ctool▁sep\uff5c>",
    f"\n```{_SHUT}",
    NamedCall("\n```json\n"),
    begin=_BEGIN,
    between="\n",
    close=_CLOSE,
)
DEEPSEEK = Syntax(
    "deepseek", _BEGIN, _OPEN, _SHUT, NamedCall("<\uff5ctool▁sep\uff5c>"), begin=_BEGIN, close=_CLOSE
)
FUNCTIONARY = Syntax("functionary", "<function=", "<function=", "</function>", NamedCall(">"))
FUNCTIONARY_LINES = Syntax("functionary-lines", ">>>", ">>>", "", NamedCall("\n"), text=">>>all\n")
COMMAND_R = _listed(
    "command-r",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    JsonCall("tool_name", "parameters", lead='"tool_call_id": "0", '),
)
COMMAND_R_PLUS = _listed("command-r-plus", "Action:\n```json\n", "\n```", JsonCall("tool_name", "parameters"))
GRANITE = _listed("granite", "<|tool_call|>")
PHI = _listed("phi", "<|tool_call|>", "<|/tool_call|>")
NEMOTRON = _listed("nemotron", "<TOOLCALL>", "</TOOLCALL>")
APRIEL = _listed("apriel", "<tool_calls>", "</tool_calls>")
FIREFUNCTION = _listed("firefunction", "functools")
APERTUS = _listed("apertus", "<|tools_prefix|>", "<|tools_suffix|>", JsonCall(name=""))
GIGACHAT = Syntax("gigachat", "<|function_call|>", "<|function_call|>", "", many=False)
GIGACHAT_ROLE = Syntax(
    "gigachat-role",
    "function call<|role_sep|>",
    "function call<|role_sep|>\n",
    "",
    many=False,
    extra="<|message_sep|>",
)
SOLAR = Syntax(
    "solar",
    "<|tool_calls|>",
    "<|tool_call:begin|>",
    "<|tool_call:end|>",
    NamedCall("<|tool_call:args|>", identity="<|tool_call:name|>"),
    begin="<|tool_calls|>",
)
LFM = Syntax(
    "lfm",
    "<|tool_call_start|>",
    "",
    "",
    ListedCall(),
    begin="<|tool_call_start|>",
    between=", ",
    close="<|tool_call_end|>",
    listed=True,
)
GEMMA = Syntax(
    "gemma",
    "<|tool_call>",
    "<|tool_call>call:",
    "<tool_call|>",
    ListedCall("{", ":", "}", '<|"|>', ","),
)
HARMONY = Syntax(
    "harmony",
    "<|channel|>",
    "<|channel|>commentary to=functions.",
    "",
    NamedCall(" <|constrain|>json<|message|>"),
    many=False,
    headers=True,
)

MARKS: tuple[tuple[Sequence[str], Syntax], ...] = (
    (("]<]minimax[>[", "invoke"), MINIMAX_NESTED),
    (("<minimax:tool_call>",), MINIMAX_INVOKE),
    (("DSML", "function_calls"), DSML),
    (("DSML",), DSML_CALLS),
    (("atem:",), ATEM),
    (("<|open|>", "argument"), KIMI_TAGGED),
    (("<|tool_call_begin|>",), KIMI),
    (("<|tool_call:begin|>",), SOLAR),
    (("<tool_sep", "<arg_key"), HUNYUAN),
    (("<arg_key>",), GLM),
    (("<\uff5ctool▁sep\uff5c>", "```json"), DEEPSEEK_FENCED),
    (("<\uff5ctool▁sep\uff5c>",), DEEPSEEK),
    (("<|channel|>", "functions."), HARMONY),
    (("<|tool_call>", "call:"), GEMMA),
    (("<seed:tool_call>",), SEED),
    (('<function name="',), MINICPM),
    (("<tool_calls>[",), APRIEL),
    (("<tool_call>", "<function="), QWEN_CODER),
    (("<function=",), FUNCTIONARY),
    ((">>>all",), FUNCTIONARY_LINES),
    (("<tool_call>",), HERMES),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<|START_ACTION|>",), COMMAND_R),
    (("Action:", "tool_name"), COMMAND_R_PLUS),
    (("<|/tool",), PHI),
    (("<|tool_call|>",), GRANITE),
    (("<TOOLCALL>",), NEMOTRON),
    (("<tool_calls>",), MINIMAX),
    (("functools[",), FIREFUNCTION),
    (("<|tools_prefix|>",), APERTUS),
    (("<|function_call|>",), GIGACHAT),
    (("function call", "<|role_sep|>"), GIGACHAT_ROLE),
    (("<|tool_call_start|>",), LFM),
    (("<|tool_list_start|>",), LFM),
    (("List of tools: [",), LFM),
    (('"parameters"', "<|python_tag|>"), LLAMA),
    (('"parameters"', "<|eot_id|>"), LLAMA),
)
"""Marks in a template, all of which must be there, and the syntax they show; the first match counts."""

SYNTAXES = tuple(dict.fromkeys([GENERIC, *(syntax for _, syntax in MARKS)]))
"""Every syntax of the table, once."""


def syntax_of(template: str | None) -> Syntax:
    """Return the syntax of a chat template, GENERIC if it has none or an unknown one."""
    template = template or ""
    found = next((one for marks, one in MARKS if all(mark in template for mark in marks)), GENERIC)
    if "tools" in template or "functions" in template:
        return found
    # It may show how calls are written without having a place for tools.
    return replace(found, taught=True) if "tool_calls" in template else GENERIC
