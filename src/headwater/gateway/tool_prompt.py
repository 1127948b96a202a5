"""Tools in a conversation with a model whose chat template does not know ``<tool_call>``: told in plain messages.

The words are those that Hermes and Qwen models are trained on (https://github.com/NousResearch/Hermes-Function-Calling).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_TOLD = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def knows_tools(template: str) -> bool:
    """Whether a chat template tells of tools itself, and in the words that ``grammar`` holds answers to."""
    return "<tool_call>" in template and "tools" in template


def told(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The conversation with roles and texts alone: the tools in its system message, calls and results as texts."""
    said = [_plain(message) for message in messages]
    if tools:
        text = _TOLD.format(tools="\n".join(json.dumps(tool) for tool in tools))
        if said and said[0]["role"] == "system":
            said[0] = {**said[0], "content": f"{said[0]['content']}\n\n{text}".lstrip()}
        else:
            said.insert(0, {"role": "system", "content": text})
    return said


def _plain(message: Message) -> dict[str, Any]:
    role, content = str(message["role"]), str(message["content"])
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = "\n".join(f"<tool_call>\n{json.dumps(_call(call))}\n</tool_call>" for call in message.get("tool_calls", ()))
    return {"role": role, "content": "\n".join(filter(None, (content, calls)))}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {"name": function["name"], "arguments": function["arguments"]}
