"""Conversations in the roles that a template can show."""

from __future__ import annotations

from typing import Any

import pytest

from edgespec.models.prompting.chat_template import ChatTemplate
from edgespec.models.prompting.conversation import TemplateFit

EACH = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
FIRST = (
    "{% if messages[0].role == 'system' %}<{{ messages[0].content }}>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
)
NONE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}:{{ m.content }}]{% endfor %}"
)
SILENT = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}:{{ m.content }}]{% endif %}{% endfor %}"
)


def conversation(roles: str) -> list[Any]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f"{role}{i}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("template", "roles", "output"),
    [
        (EACH, "ssuas", "[system:s0][system:s1][user:u2][assistant:a3][system:s4]"),
        (EACH, "uu", "[user:u0][user:u1]"),
        (FIRST, "sua", "<s0>[user:u1][assistant:a2]"),
        (FIRST, "ssu", "<s0\n\ns1>[user:u2]"),
        (FIRST, "sus", "<s0>[user:u1\n\ns2]"),
        (FIRST, "us", "[user:u0\n\ns1]"),
        (FIRST, "uuaau", "[user:u0\n\nu1][assistant:a2\n\na3][user:u4]"),
        (NONE, "su", "[user:s0\n\nu1]"),
        (NONE, "suas", "[user:s0\n\nu1][assistant:a2][user:s3]"),
        (NONE, "s", "[user:s0]"),
        (SILENT, "su", "[user:s0\n\nu1]"),
        (SILENT, "uu", "[user:u0][user:u1]"),
    ],
)
def test_every_message_is_shown(template: str, roles: str, output: str) -> None:
    made = ChatTemplate(template)
    messages = conversation(roles)
    assert "".join(made.render(TemplateFit(made).fitted(messages))) == output
    assert messages == conversation(roles)


def test_calls_are_not_joined() -> None:
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}
    messages = [*conversation("u"), call, {"role": "tool", "content": "R"}, *conversation("a")]
    assert TemplateFit(ChatTemplate(FIRST)).fitted(messages) == messages


def test_a_template_is_tried_only_where_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> list[str]:
        raise AssertionError

    monkeypatch.setattr(ChatTemplate, "render", never)
    assert TemplateFit(ChatTemplate(FIRST)).fitted(conversation("uau")) == conversation("uau")
