"""Chat templates: the usual styles, hostile ones, hostile content, and a worker that dies.

The templates here imitate the styles of well-known families; none is a model's own.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgespec.core import EdgespecError
from edgespec.models.prompting import chat_template
from edgespec.models.prompting.chat_template import ChatTemplate, Message, fold_system

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CONTROL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<end_of_turn>"]

CHATML = """\
{%- if tools is not none and tools %}
<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' else 'Be helpful.' }}
Tools:
{%- for tool in tools %}
  {{ tool | tojson }}
{%- endfor %}
<|im_end|>
{% elif messages[0].role != 'system' %}
<|im_start|>system
Be helpful.<|im_end|>
{% endif %}
{%- for m in messages %}
    {%- if tools and loop.first and m.role == 'system' %}{% continue %}{% endif %}
<|im_start|>{{ m.role }}
{% generation %}{{ m.content }}{% endgeneration %}
    {%- for call in m.tool_calls %}
<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>
    {%- endfor %}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

HEADERS = """\
{{ bos_token }}<|head|>system<|/head|>

Today is {{ strftime_now("%d %b %Y") }}.<|eot|>
{%- for m in messages %}<|head|>{{ m['role'] }}<|/head|>

{{ m['content'] | trim }}<|eot|>
{%- endfor %}"""

TURNS = """\
{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}<end_of_turn>
{% endfor %}"""

INST = """\
{%- set ns = namespace(turn=0) %}
{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {%- set ns.turn = ns.turn + 1 %}
        {{- '[INST]' ~ ns.turn ~ ' ' ~ m.content ~ '[/INST]' }}
    {%- else %}{{ m.content ~ eos_token }}{% endif %}
{%- endfor %}"""

JOINED = "{% for m in messages %}{{ m.content }}{% endfor %}"  # nothing between one string and the next

USER: list[Message] = [{"role": "user", "content": "Hi & <b>bye</b>"}]
SYSTEM: list[Message] = [{"role": "system", "content": "Be brief."}, *USER]
TOOL = {"type": "function", "function": {"name": "clock", "description": 'Tells "the" time, Zürich <b>'}}


@pytest.fixture(autouse=True, scope="module")
def _no_worker_left() -> Iterator[None]:
    yield
    chat_template._WORKER.close()
    assert not [child for child in psutil.Process().children() if "chat_worker" in str(child.as_dict())]


def plain(source: str, messages: Sequence[Message], **variables: Any) -> str:
    """What Jinja alone makes of it."""
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return env.from_string(source).render(messages=messages, **{"tools": None} | variables)


def pid() -> int:
    assert chat_template._WORKER._process is not None
    return chat_template._WORKER._process.pid


def works() -> bool:
    return ChatTemplate(JOINED).render(USER) == [USER[0]["content"]]


# The usual styles


def test_chatml() -> None:
    template = ChatTemplate(CHATML, control_tokens=CONTROL)
    assert template.render(USER) == [
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nHi & <b>bye</b><|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    assert template.render(SYSTEM, tools=[], add_generation_prompt=False) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi & <b>bye</b><|im_end|>\n"
    ]


def test_tools_are_json_without_html_escapes() -> None:
    (text,) = ChatTemplate(CHATML, control_tokens=CONTROL).render(SYSTEM, tools=[TOOL])
    assert 'Tools:  {"type": "function", "function": {"name": "clock", "description": ' in text
    assert r'"Tells \"the\" time, Zürich <b>"}}<|im_end|>' in text
    assert text.count("Be brief.") == 1


def test_tojson_takes_the_arguments_that_templates_give_it() -> None:
    source = "{{ extra | tojson(indent=1, separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}"
    assert ChatTemplate(source).render([], extra={"extra": {"b": "ü", "a": 1}}) == [
        '{\n "a":1,\n "b":"\\u00fc"\n}'
    ]


def test_no_tools_are_none() -> None:
    assert ChatTemplate("{{ tools is none }}").render(USER, tools=[]) == ["True"]


def test_headers_with_a_date() -> None:
    days = [datetime.datetime.now()]
    (text,) = ChatTemplate(HEADERS, bos="<|bos|>").render([{"role": "user", "content": " Hi \n"}])
    days.append(datetime.datetime.now())
    rest = "<|eot|><|head|>user<|/head|>\n\nHi<|eot|>"
    assert text in [f"<|bos|><|head|>system<|/head|>\n\nToday is {day:%d %b %Y}.{rest}" for day in days]


def test_a_refused_system_role_is_reported_and_can_be_folded() -> None:
    template = ChatTemplate(TURNS, bos="<bos>")
    with pytest.raises(EdgespecError, match=r"refuses this conversation: System role not supported$"):
        template.render(SYSTEM)
    folded = template.render(fold_system(SYSTEM))
    assert folded == ["<bos><start_of_turn>user\nBe brief.\n\nHi & <b>bye</b><end_of_turn>\n"]


def test_fold_system() -> None:
    assert fold_system(USER) == USER
    assert fold_system(SYSTEM[:1]) == [{"role": "user", "content": "Be brief."}]
    answer = {"role": "assistant", "content": "Hello"}
    late = [answer, *SYSTEM, answer]
    assert fold_system(late) == [answer, {"role": "user", "content": "Be brief.\n\nHi & <b>bye</b>"}, answer]


def test_alternating_roles() -> None:
    template = ChatTemplate(INST, bos="<s>", eos="</s>", control_tokens=CONTROL)
    turns = [*USER, {"role": "assistant", "content": "Hello"}, *USER]
    (text,) = template.render(turns)
    assert text == "<s>[INST]1 Hi & <b>bye</b>[/INST]Hello</s>[INST]2 Hi & <b>bye</b>[/INST]"
    with pytest.raises(EdgespecError, match="Conversation roles must alternate"):
        template.render([*turns, *USER])


# Hostile templates


HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": r"took over 0\.5 s",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "memory",
    "{{ '%1000000000d' % 1 }}": "ran out of memory",
    "{{ [0] * 10 ** 10 }}": "ran out of memory",
    "{{ 7 ** (7 ** 9) }}": "took over",
    "{{ 'x' * 1000001 }}": "too long for a prompt",
    "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}": "too long for a prompt",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "sandbox",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "sandbox",
    "{{ lipsum.__globals__['os'].system('id') }}": "sandbox",
    "{{ namespace.__init__.__globals__.x }}": "sandbox",
    "{{ (raise_exception | attr('__globals__'))['json'] }}": "sandbox",
    "{{ messages | map(attribute='__class__.__mro__') | list }}": "sandbox",
    "{{ '{0.__class__.__mro__}'.format('') }}": "sandbox",
    "{{ messages.clear() }}": "sandbox",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ " + "(" * 50_000 + "1": "RecursionError|died",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import '/etc/passwd' as p %}": "no loader",
    "{% extends '/etc/passwd' %}": "no loader",
    "{{ range(10 ** 9) }}": "OverflowError",
    "{{ nothing.at.all }}": "UndefinedError: 'nothing' is undefined",
    "\n\n{% if %}": r"not valid Jinja \(line 3",
    '{{ "\\ud800" }}': "not Unicode",
}


@pytest.mark.parametrize(("source", "reason"), HOSTILE.items(), ids=[source[:40] for source in HOSTILE])
def test_hostile_templates_cost_one_line_and_little_time(source: str, reason: str) -> None:
    seconds = 0.5 if reason.startswith("took") else 10  # touching 768 MB takes a while too
    template = ChatTemplate(source, max_seconds=seconds, max_characters=1_000_000)
    chat_template._WORKER.start()
    start = time.monotonic()
    with pytest.raises(EdgespecError, match=reason) as e:
        template.render(USER)
    assert time.monotonic() - start < 10
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 400
    assert works()


def test_an_unsafe_attribute_alone_is_empty() -> None:
    assert ChatTemplate("[{{ ''.__class__ }}{{ nothing }}]").render([]) == ["[]"]


def test_messages_of_a_template_cannot_reach_the_terminal() -> None:
    with pytest.raises(EdgespecError) as e:
        ChatTemplate(r"{{ raise_exception('\x1b[2J\nboo\u202e' ~ 'x' * 10 ** 6) }}").render([])
    assert r"\x1b[2J\nboo\u202e" in str(e.value)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 300


def test_memory_is_bounded_where_the_system_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_MEMORY", 1)
    endless = next(iter(HOSTILE))
    with pytest.raises(EdgespecError, match="out of memory"):
        ChatTemplate(endless, max_seconds=30).render(USER)


@linux
def test_the_worker_is_boxed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESPEC_SECRET", "s3cret")
    chat_template._WORKER.close()
    assert works()
    worker = psutil.Process(pid())
    assert worker.cwd() == "/"
    assert set(worker.environ()) <= {*chat_template._KEPT, "LC_CTYPE"}  # Python itself sets the last
    for kind, most in (("NOFILE", 3), ("CORE", 0), ("FSIZE", 0), ("NPROC", 0)):
        assert worker.rlimit(getattr(psutil, f"RLIMIT_{kind}")) == (most, most)
    assert worker.num_fds() == 3


# Hostile content


def owned(pieces: Sequence[str]) -> int:
    """Control tokens that a tokenizer would see."""
    return sum(piece.startswith(token, i) for piece in pieces for i in range(len(piece)) for token in CONTROL)


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_content_stay_text(token: str) -> None:
    def conversation(text: str) -> list[Message]:
        call = {"function": {"name": f"f{text}", "arguments": {f"k{text}": [text, {"deep": text}], "n": 1}}}
        return [
            {"role": "system", "content": f"a{text}"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text * 3, "tool_calls": [call]},
            {"role": "tool", "content": f"{text}\n"},
        ]

    tool = {**TOOL, "description": token, token: token}
    template = ChatTemplate(CHATML, control_tokens=CONTROL)
    pieces = template.render(conversation(token), tools=[tool])
    harmless = template.render(conversation("-"), tools=[TOOL])
    assert len(harmless) == 1
    assert owned(pieces) == owned(harmless)
    assert "".join(pieces) == plain(CHATML, conversation(token), tools=[tool], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "contents", "pieces"),
    [
        (JOINED, ["a<|im_", "end|>"], ["a<|im_", "end|>"]),
        (JOINED, ["<|im_ ", "end|>"], ["<|im_ end|>"]),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", ["<s ", " >"], ["<s", ">"]),
        ("<{{ messages[0].content }}>", ["|im_end|"], ["<", "|im_end|>"]),
        ("<|im_{{ messages[0].content }}", ["end|>!"], ["<|im_", "end|>!"]),
        ("{{ messages[0].content }}>", ["<|im_end|"], ["<|im_end|", ">"]),
        (JOINED, ["> quoted", " 1 <"], ["> quoted 1 <"]),
        ("<s>{{ messages[0].content }}</s>", ["> quoted <"], ["<s>> quoted <</s>"]),
        ("{{ messages[0].content }}", [r"\udfff</s>\udfff"], [r"\udfff<", r"/s>\udfff"]),
    ],
)
def test_control_tokens_put_together_from_parts(source: str, contents: list[str], pieces: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    assert ChatTemplate(source, control_tokens=CONTROL).render(messages) == pieces


def test_a_template_may_compare_and_wrap_a_role() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|' ~ m.role ~ '|>' }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source, control_tokens=["<|user|>"]).render(USER) == ["<|user|>"]


def test_overlapping_control_tokens_are_all_cut() -> None:
    template = ChatTemplate(JOINED, control_tokens=["<<a>>", "<a>", "a>>", "aa"])
    for content in ("<<a>>", "aaaa", "<a>>"):
        pieces = template.render([{"role": "user", "content": content}])
        assert "".join(pieces) == content
        assert not [p for p in pieces if any(t in p for t in ("<<a>>", "<a>", "a>>", "aa"))]


@pytest.mark.parametrize("shown", ["m.content | tojson(ensure_ascii=true)", "[m.content]", "m"])
@pytest.mark.parametrize("content", ["x</s>y", r"x</s>\udfff", "ü</s>"])
def test_marks_leave_no_trace_in_escaped_text(shown: str, content: str) -> None:
    source = f"{{% for m in messages %}}{{{{ {shown} }}}}{{% endfor %}}"
    messages = [{"content": content}]
    pieces = ChatTemplate(source, control_tokens=CONTROL).render(messages)
    assert owned(pieces) == 0
    if r"\udfff" not in content:  # or else the marks cannot be notes from it, and stay
        assert "".join(pieces) == plain(source, messages)


def test_lone_surrogates_become_replacement_characters() -> None:
    assert ChatTemplate(JOINED).render([{"content": "a\ud83d\udfffb"}]) == ["a\ufffd\ufffdb"]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", {(1, 2): 3}])
def test_messages_that_are_not_json(value: object) -> None:
    with pytest.raises(EdgespecError, match="not valid JSON"):
        ChatTemplate(JOINED).render([{"content": value}])


def test_messages_without_an_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(EdgespecError, match="not valid JSON"):
        ChatTemplate(JOINED).render([{"content": endless}])


_fragments = st.sampled_from([t[:n] for t in CONTROL for n in (1, 3, len(t) - 1, len(t))])
_endings = st.sampled_from([t[n:] for t in CONTROL for n in (1, 3, len(t) - 1)])
_contents = st.lists(st.one_of(_fragments, _endings, st.text(max_size=3)), min_size=1).map("".join)


@settings(deadline=None, max_examples=150)
@given(st.lists(_contents, min_size=1, max_size=4), st.dictionaries(_contents, _contents, max_size=2))
def test_content_never_makes_a_control_token(contents: list[str], arguments: Mapping[str, str]) -> None:
    contents = [c.encode("utf-8", "replace").decode() for c in contents]
    arguments = {json.loads(json.dumps(k)): v for k, v in arguments.items()}
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": c, "tool_calls": [call]} for c in contents]
    harmless = [{"role": "user", "content": "-"} for _ in contents]
    for source in (CHATML, TURNS, JOINED):
        template = ChatTemplate(source, control_tokens=CONTROL)
        pieces = template.render(messages)
        expected = plain(source, messages, add_generation_prompt=True)
        assert "".join(pieces) == expected
        assert owned(pieces) == owned(template.render(harmless))
        assert len(pieces) == 1 or owned([expected]) > owned(pieces)


# The worker


def test_a_worker_killed_while_idle_is_replaced() -> None:
    assert works()
    before = pid()
    psutil.Process(before).kill()
    assert chat_template._WORKER._process is not None
    chat_template._WORKER._process.wait()
    assert works()
    assert pid() != before


def test_a_worker_killed_in_the_middle_is_reported_and_replaced() -> None:
    assert works()
    killer = threading.Timer(0.3, psutil.Process(pid()).kill)
    killer.start()
    with pytest.raises(EdgespecError, match="died"):
        ChatTemplate(next(iter(HOSTILE)), max_seconds=30).render(USER)
    killer.join()
    assert works()
    assert not [c for c in psutil.Process().children() if c.status() == psutil.STATUS_ZOMBIE]


@posix
def test_a_worker_that_does_not_read_cannot_block() -> None:
    assert works()
    os.kill(pid(), signal.SIGSTOP)
    with pytest.raises(EdgespecError, match="took over"):
        ChatTemplate(JOINED, max_seconds=0.2).render([{"content": "x" * 1_000_000}])
    assert works()


@posix
def test_an_interrupted_render_does_not_answer_the_next() -> None:
    interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        ChatTemplate(next(iter(HOSTILE)), max_seconds=30).render(USER)
    interrupt.join()
    assert works()


def test_two_threads_get_their_own_answers() -> None:
    wrong: list[str] = []

    def render(name: str) -> None:
        template = ChatTemplate(name + JOINED)
        for i in range(40):
            pieces = template.render([{"content": f" {i}"}])
            if pieces != [f"{name} {i}"]:
                wrong.extend(pieces)

    threads = [threading.Thread(target=render, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("pass", "died"),
        ("print('{}'); print('not JSON')", "sandbox"),
        ("print('{}'); print('[' * 9_000)", "sandbox"),
        ("print('{}'); print('x' * 50_000)", "too long for a prompt"),
    ],
)
def test_a_worker_out_of_control(monkeypatch: pytest.MonkeyPatch, program: str, reason: str) -> None:
    chat_template._WORKER.close()
    program += "; import sys; sys.stdout.flush(); sys.stdin.read()" if program != "pass" else ""
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "worker_command", lambda: [sys.executable, "-c", program])
        with pytest.raises(EdgespecError, match=reason):
            ChatTemplate(JOINED, max_characters=1000).render(USER)
    assert works()


@posix
def test_a_process_that_keeps_the_pipes_cannot_block(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import subprocess; print('{}', flush=True); subprocess.run(['sleep', '4'])"
    chat_template._WORKER.close()
    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "worker_command", lambda: [sys.executable, "-c", program])
        with pytest.raises(EdgespecError, match="took over"):
            ChatTemplate(JOINED, max_seconds=0.2).render(USER)
    assert time.monotonic() - start < 3
    assert works()


def test_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    chat_template._WORKER.close()
    monkeypatch.setattr(chat_template, "worker_command", lambda: ["/nonexistent/python"])
    with pytest.raises(EdgespecError, match="cannot start the process"):
        ChatTemplate(JOINED).render(USER)


def test_a_frozen_program_is_its_own_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert chat_template.worker_command() == [sys.executable, "_render-worker"]


def ends(worker: int) -> bool:
    """Whether it ends within 5 s. In a container nobody may reap an orphan: a zombie counts as ended."""
    deadline = time.monotonic() + 5
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    return True


SCRIPT = """
import os, signal
from edgespec.models.prompting import chat_template as chat
chat.ChatTemplate("{{ 1 }}").render([])
print(chat._WORKER._process.pid, flush=True)
"""


@pytest.mark.parametrize("end", ["", pytest.param("os.kill(os.getpid(), signal.SIGKILL)", marks=posix)])
def test_no_worker_outlives_the_program(end: str) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT + end]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode == (-signal.SIGKILL if end else 0)
    assert ends(int(done.stdout))
