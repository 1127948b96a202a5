"""Tools in plain messages, for templates that do not know them."""

from __future__ import annotations

from typing import Any

from headwater.gateway.tool_prompt import knows_tools, told
from tests.gateway.engine_models import folder

TOOL: Any = {"type": "function", "function": {"name": "paint", "description": "", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": {"colour": "red"}}}
HERMES = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.colour }}{% endfor %}{% endfor %}"
)


def test_nothing_is_added_where_there_are_no_tools() -> None:
    said = [{"role": "user", "content": "a"}]
    assert told(said, None) == said


def test_tools_are_told_in_the_system_message() -> None:
    for before in ([], [{"role": "system", "content": "Be brief."}]):
        first, second = told([*before, {"role": "user", "content": "a"}], [TOOL])
        assert first["role"] == "system"
        assert first["content"].startswith("Be brief.\n\n# Tools" if before else "# Tools")
        assert '"name": "paint"' in first["content"]
        assert second == {"role": "user", "content": "a"}


def test_calls_and_results_become_texts() -> None:
    said = [
        {"role": "assistant", "content": "Yes.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]
    call = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'
    assert told(said, None) == [
        {"role": "assistant", "content": f"Yes.\n{call}\n{call}"},
        {"role": "user", "content": "<tool_response>\ndone\n</tool_response>"},
    ]


def test_a_template_that_knows_tools_gets_them() -> None:
    model = folder()
    said = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    plain = model.spell(model.apply_chat_template(said, [TOOL]))
    assert plain.startswith("<system># Tools")
    model.tokenizer.chat_template = HERMES
    assert knows_tools(HERMES)
    assert model.spell(model.apply_chat_template(said, [TOOL])).endswith("assistant:<tool_call>red")
