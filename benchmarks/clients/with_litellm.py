"""What LiteLLM asks of an OpenAI-compatible server. Arguments: the server's address, the model's folder."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import litellm

URL, FOLDER = sys.argv[1], Path(sys.argv[2])
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "on": {"type": "boolean"}},
    "required": ["colour", "on"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "paint", "description": "Paint.", "parameters": SCHEMA}}]


def check(name: str, holds: Any) -> None:
    print(f"litellm {litellm_version()}: {name}: {'passed' if holds else 'FAILED'}", flush=True)
    if not holds:
        raise SystemExit(1)


def litellm_version() -> str:
    from importlib import metadata

    return metadata.version("litellm")


def asked(provider: str) -> dict[str, Any]:
    return {"model": f"{provider}/{FOLDER.name}", "api_base": f"{URL}/v1", "api_key": "none", "max_tokens": 60}


def painted(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"colour", "on"} and found["colour"] in {"red", "blue"}


def painting(text: str, provider: str) -> bool:
    """Arguments of the tool. LiteLLM takes ``additionalProperties`` away for vLLM: a random model then never ends."""
    return text.startswith('{"colour": "') if provider == "hosted_vllm" else painted(text)


def main() -> None:
    for provider in ("openai", "hosted_vllm"):
        common = asked(provider)
        answer = litellm.completion(messages=HELLO, temperature=0, n=1, seed=1, user="me", **common)
        check(f"{provider}: chat", answer.choices[0].message.content and answer.usage.total_tokens)
        parts = list(litellm.completion(messages=HELLO, temperature=0, stream=True, seed=1, **common))
        streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        check(f"{provider}: chat, streamed", streamed == answer.choices[0].message.content)
        form = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA, "strict": True}}
        answer = litellm.completion(messages=HELLO, response_format=form, **common)
        check(f"{provider}: chat, JSON of a schema", painted(answer.choices[0].message.content))
        named = {"type": "function", "function": {"name": "paint"}}
        called = common | {"max_tokens": 200}
        answer = litellm.completion(messages=HELLO, tools=TOOLS, tool_choice=named, **called)
        (call,) = answer.choices[0].message.tool_calls
        check(
            f"{provider}: chat, a tool", call.function.name == "paint" and painting(call.function.arguments, provider)
        )
        parts = list(litellm.completion(messages=HELLO, tools=TOOLS, tool_choice=named, stream=True, **called))
        whole = litellm.stream_chunk_builder(parts)
        (again,) = whole.choices[0].message.tool_calls
        check(f"{provider}: chat, a tool, streamed", painting(again.function.arguments, provider))
        call.function.arguments = '{"colour": "red", "on": true}'
        told = [
            *HELLO,
            answer.choices[0].message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ]
        answer = litellm.completion(messages=told, tools=TOOLS, **common)
        check(f"{provider}: chat, a tool's result", answer.choices[0].finish_reason in {"stop", "length", "tool_calls"})
        answer = asyncio.run(litellm.acompletion(messages=HELLO, **common))
        check(f"{provider}: chat, async", answer.choices[0].finish_reason)
    answer = litellm.text_completion(
        **asked("text-completion-openai"), prompt="hello", echo=True, logprobs=2, temperature=0
    )
    check("text completion with echo and logprobs", answer.choices[0].logprobs.token_logprobs[0] is None)
    many = litellm.batch_completion(messages=[HELLO, HELLO], **asked("openai"))
    check("batch", len(many) == 2)
    answer = litellm.responses(
        model=f"openai/{FOLDER.name}", api_base=f"{URL}/v1", api_key="none", input="hello", max_output_tokens=20
    )
    check("responses", answer.output[0].content[0].text)
    events = list(
        litellm.responses(
            model=f"openai/{FOLDER.name}",
            api_base=f"{URL}/v1",
            api_key="none",
            input="hello",
            max_output_tokens=20,
            stream=True,
        )
    )
    check("responses, streamed", str(events[-1].type.value) in {"response.completed", "response.incomplete"})
    try:
        litellm.completion(messages=[{"role": "user", "content": "x" * 5000}], **asked("openai"))
    except litellm.ContextWindowExceededError:
        check("a prompt that is too long is its ContextWindowExceededError", holds=True)


if __name__ == "__main__":
    main()
