"""Loading models, and refusing those that cannot be served."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headwater.errors import UsageError
from headwater.gateway import hf
from headwater.gateway.engine import Engine
from headwater.gateway.engine_types import PromptInvalid
from headwater.gateway.sources import MemorySource
from tests.gateway.engine_models import Swapper, ask, folder, greedy, reference, tokenizer


def saved(path: Path, kind: str = "llama") -> Any:
    model = folder(kind)
    model.module.save_pretrained(path)  # type: ignore[operator]
    model.tokenizer.save_pretrained(path)
    return model


def test_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "tiny")
    model = hf.load(str(tmp_path / "tiny"), context=100)
    assert (model.name, model.context, model.vocabulary) == ("tiny", 100, 260)
    assert 257 in model.eos
    engine = Engine(model, MemorySource("tiny"))
    client, _ = ask(engine, greedy(b"hello", 10))
    client.wait()
    engine.close()
    assert client.ids == reference(b"hello", 10)


def test_a_folder_in_another_dtype(tmp_path: Path) -> None:
    saved(tmp_path)
    assert next(hf.load(str(tmp_path), dtype=torch.bfloat16).module.parameters()).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base")
    base.module.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(4)
    adapted = peft.get_peft_model(base.module, config)
    adapted.save_pretrained(tmp_path / "adapter")
    model = hf.load(str(tmp_path / "adapter"))
    swapper = Swapper(model, MemorySource("adapter"))
    engine = swapper.engine
    client, _ = ask(engine, greedy(b"hello", 10))
    client.wait()
    ids = torch.tensor([[*b"hello"]])
    adapted.generation_config.eos_token_id = None
    with torch.inference_mode(), warnings.catch_warnings():
        expected = adapted.generate(input_ids=ids, do_sample=False, max_new_tokens=10, pad_token_id=256)[0, 5:].tolist()
    assert client.ids == expected
    assert client.ids != reference(b"hello", 10)
    # A version of an adapter holds the adapter's own tensors: without them the base is left.
    swapper.publish({n: torch.zeros_like(p) for n, p in model.module.named_parameters() if "lora_" in n})
    client, _ = ask(engine, greedy(b"hello", 10))
    client.wait()
    engine.close()
    assert client.ids == reference(b"hello", 10)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no language model could be loaded"):
        hf.load(str(tmp_path))
    with pytest.raises(UsageError, match=r"no\.gguf"):
        hf.load(str(tmp_path / "no.gguf"))
    with pytest.raises(UsageError, match="no package"):
        hf.packaged("headwater-no-such-package")
    with pytest.raises(UsageError, match=r"0 \.gguf files"):
        hf.packaged("pytest")


def test_a_model_whose_past_is_another_kind_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=260, hidden_size=16, n_layer=1, n_head=2)
    module = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match="does not run on the standard key-value cache"):
        hf.try_out(hf.ModelFolder("bloom", module, tokenizer()))


def test_a_model_that_is_not_steady_is_noticed() -> None:
    model = folder()
    model.module.bfloat16()
    assert hf.steady(model)
    model.module.set_attn_implementation("sdpa")  # type: ignore[operator]
    model._by_row = False  # as if it could not be changed
    assert not hf.steady(model)


def test_a_sliding_window_bounds_the_context() -> None:
    config = transformers.MistralConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=64, max_position_embeddings=256,
    )  # fmt: skip
    module = transformers.AutoModelForCausalLM.from_config(config)
    model = hf.ModelFolder("mistral", module, tokenizer())
    hf.try_out(model)
    assert model.context == 64


def test_a_model_without_a_chat_template() -> None:
    model = folder()
    model.tokenizer.chat_template = None
    with pytest.raises(PromptInvalid, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])
