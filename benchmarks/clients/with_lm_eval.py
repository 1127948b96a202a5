"""lm-eval on a server and on the same files. Arguments: the server's address, the model's folder."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

URL, FOLDER = sys.argv[1], Path(sys.argv[2])

DOCUMENTS = [
    {"question": f"What follows {a} and {b}?", "choices": [str(a + b), str(a - b), "nothing at all"], "answer": a % 3}
    for a in range(1, 5)
    for b in (1, 4)
]

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

ROLLING = """
task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""

WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["Z", "\\n\\n", "Question:", "</s>", "<|im_end|>"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(model: str, arguments: dict[str, Any], tasks: list[str], manager: TaskManager, **more: Any) -> Any:
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=0,
        bootstrap_iters=0,
        log_samples=True,
        **more,
    )
    assert found is not None
    return found


def answers(found: Any, task: str) -> list[Any]:
    """Of each document what the model said: log-probabilities and whether they are the likeliest, or texts."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


def check(name: str, holds: bool, said: str = "") -> None:
    print(f"lm-eval {metadata.version('lm_eval')}: {name}: {'passed' if holds else 'FAILED'} {said}", flush=True)
    if not holds:
        raise SystemExit(1)


def differing(ours: list[Any], theirs: list[Any]) -> str:
    """The first answer that is another one."""
    found = [(one, other) for one, other in zip(ours, theirs, strict=True) if one != other]
    return f"{len(found)} of {len(ours)}: {found[0]}" if found else ""


def flat(value: Any) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in flat(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


def main() -> None:
    data = Path("documents.json").absolute()
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    place = Path("tasks")
    place.mkdir()
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("written", WRITTEN)):
        (place / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    manager = TaskManager(include_path=str(place), include_defaults=False)
    scored = ["toy_choice", "toy_rolling", "toy_written"]
    alone = evaluate("hf", {"pretrained": str(FOLDER), "device": "cpu", "dtype": "float32"}, scored, manager)
    served = {"model": FOLDER.name, "base_url": f"{URL}/v1/completions", "num_concurrent": 1, "max_length": 4096}
    local = served | {"tokenizer": str(FOLDER), "tokenizer_backend": "huggingface"}
    ways = {
        "token ids": (local, 1),
        "token ids, batches of 4": (local, 4),
        "texts": (local | {"tokenized_requests": False}, 1),
        "the server's tokenizer": (served, 4),
    }
    for way, (arguments, batch) in ways.items():
        found = evaluate("local-completions", arguments, scored, manager, batch_size=batch)
        for task in scored[:2]:
            ours, theirs = flat(answers(found, task)), flat(answers(alone, task))
            apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
            check(f"local-completions, {way}, {task}", apart < 1e-3, f"({len(ours)} figures, {apart:.1e} apart)")
        other = differing(answers(found, "toy_written"), answers(alone, "toy_written"))
        check(f"local-completions, {way}, toy_written", not other, other)
    chat = {"model": FOLDER.name, "base_url": f"{URL}/v1/chat/completions", "num_concurrent": 2, "max_length": 4096}
    told = evaluate("local-chat-completions", chat, ["toy_written"], manager, apply_chat_template=True)
    alike = evaluate(
        "hf",
        {"pretrained": str(FOLDER), "device": "cpu", "dtype": "float32"},
        ["toy_written"],
        manager,
        apply_chat_template=True,
    )
    apart = differing(answers(told, "toy_written"), answers(alike, "toy_written"))
    check("local-chat-completions, toy_written", not apart, apart)


if __name__ == "__main__":
    main()
