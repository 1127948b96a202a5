"""Models out of files: whole, or an error that names what is wrong. Never a value that the library made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headwater import pretrained
from headwater.errors import DataError
from tests.gateway.engine_models import folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\nsize 271062\n"  # noqa: E501
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of a model: with tied and with untied embeddings, with and without a prefix of its base."""
    return save(tmp_path / request.param, request.param)


def save(path: Path, kind: str = "llama", **options: Any) -> Path:
    model = folder(kind)
    model.module.save_pretrained(path, **options)  # type: ignore[operator]
    model.tokenizer.save_pretrained(path)
    return path


def edit(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def load(path: Path) -> Any:
    return pretrained.load(transformers.AutoModelForCausalLM, str(path))


def same(model: Any, kind: str) -> bool:
    wanted = folder(kind).module.state_dict()
    return all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_whole_folder(saved: Path) -> None:
    assert same(load(saved), saved.name)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]
)
def test_the_prefix_of_a_wrapper_is_taken_off_and_said_once(
    saved: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit(saved, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    with caplog.at_level(logging.WARNING, "headwater"):
        assert same(load(saved), saved.name)
    said = [record.message for record in caplog.records if record.name.startswith("headwater")]
    assert [prefix in line for line in said] == [True]


def test_a_layer_that_was_compiled_alone(saved: Path) -> None:
    edit(saved, lambda tensors: {name.replace(".1.", ".1._orig_mod."): t for name, t in tensors.items()})
    assert same(load(saved), saved.name)


def test_a_file_of_torch_is_looked_at_too(tmp_path: Path) -> None:
    path = save(tmp_path / "llama")
    (path / "model.safetensors").unlink()
    state = folder().module.state_dict()
    write = torch.save  # noqa: TID251 - as older folders hold it
    write({f"_orig_mod.{name}": t for name, t in state.items()}, path / "pytorch_model.bin")
    assert same(load(path), "llama")
    write({name: t for name, t in state.items() if "q_proj" not in name}, path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(path)


def test_files_that_are_not_read_may_be_in_any_state(tmp_path: Path) -> None:
    path = save(tmp_path / "llama")
    for name in ("pytorch_model.bin", "training_args.bin", "notes.json", "other.gguf", "model.onnx"):
        (path / name).write_bytes(POINTER)
    assert same(load(path), "llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pointer of git-lfs"):
        load(path)


def test_two_tensors_of_one_name_are_not_chosen_between(saved: Path) -> None:
    edit(saved, lambda tensors: tensors | {f"_orig_mod.{name}": t + 1 for name, t in tensors.items()})
    with pytest.raises(DataError, match="with the name of a wrapper and without it"):
        load(saved)


def test_every_tensor_is_missed(saved: Path) -> None:
    file = saved / "model.safetensors"
    whole = load_file(file)
    for name in whole:
        save_file({other: t for other, t in whole.items() if other != name}, file, metadata={"format": "pt"})
        with pytest.raises(DataError) as refused:
            load(saved)
        assert name in str(refused.value)
        assert "nothing was loaded" in str(refused.value)


def test_the_other_name_of_a_tied_tensor_will_do(tmp_path: Path) -> None:
    path = save(tmp_path / "llama")
    edit(path, lambda tensors: {("lm_head.weight" if "embed" in name else name): t for name, t in tensors.items()})
    assert same(load(path), "llama")


def test_an_unknown_prefix(saved: Path) -> None:
    edit(saved, lambda tensors: {f"net.{name}": t for name, t in tensors.items()})
    with pytest.raises(DataError, match=r"lacks lm_head\.weight.* more; nothing was loaded"):
        load(saved)


def test_tensors_that_the_model_has_no_place_for(saved: Path) -> None:
    edit(
        saved, lambda tensors: tensors | {n.replace(".1.", ".2."): t.clone() for n, t in tensors.items() if ".1." in n}
    )
    with pytest.raises(DataError, match=r"no place for.*\.2\..*put the config and the weights of one model together"):
        load(saved)


def test_a_bias_that_the_config_does_not_know(tmp_path: Path) -> None:
    path = save(tmp_path / "llama")
    edit(path, lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(DataError, match=r"no place for.*q_proj\.bias"):
        load(path)


def test_the_head_of_another_task_is_named_and_left(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(saved, lambda tensors: tensors | {"score.weight": torch.zeros(2, 32)})
    with caplog.at_level(logging.WARNING, "headwater"):
        assert same(load(saved), saved.name)
    assert "score.weight" in caplog.text


def test_another_shape_or_kind(saved: Path) -> None:
    file = saved / "model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if "mlp" in name)
    for other, said in ((whole[name][:3].clone(), r"has shape \(3"), (whole[name].to(torch.int8), "stored as I8")):
        save_file(whole | {name: other}, file, metadata={"format": "pt"})
        with pytest.raises(DataError, match=said) as refused:
            load(saved)
        assert name in str(refused.value)


@pytest.mark.parametrize("change", [1, -1])
def test_a_config_of_another_number_of_layers(tmp_path: Path, change: int) -> None:
    path = save(tmp_path / "llama")
    config = json.loads((path / "config.json").read_bytes())
    config["num_hidden_layers"] += change
    config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"model\.layers\.[12]\."):
        load(path)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    path = save(tmp_path / "llama", max_shard_size="10KB")
    assert same(load(path), "llama")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    for now, said in (
        (None, rf"lacks {shard.name}, which model\.safetensors\.index\.json names"),
        (data[: len(data) // 2], "is damaged"),
        (data[:4], "is damaged"),
        (b"", "is empty"),
        (POINTER, "is a pointer of git-lfs.*git lfs pull"),
    ):
        shard.unlink() if now is None else shard.write_bytes(now)
        with pytest.raises(DataError, match=said) as refused:
            load(path)
        assert shard.name in str(refused.value)
    shard.write_bytes(data)
    held = load_file(shard)
    lost, *_ = held
    save_file({name: t for name, t in held.items() if name != lost}, shard, metadata={"format": "pt"})
    with pytest.raises(DataError, match=lost):
        load(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', ""])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    path = save(tmp_path / "llama", max_shard_size="10KB")
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match="index"):
        load(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_none(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "llama")
    for text in (b"{", b"[]", b"", b"\x00\x01", POINTER):
        (path / name).write_bytes(text)
        with pytest.raises(DataError, match=name):
            load(path)
        with pytest.raises(DataError, match=name):
            pretrained.load_tokenizer(str(path))


def test_what_is_no_folder(tmp_path: Path) -> None:
    path = save(tmp_path / "llama")
    for other, said in ((path / "model.safetensors", "is a file: name the folder"), (tmp_path / "gone", "not there")):
        with pytest.raises(DataError, match=said):
            load(other)
        with pytest.raises(DataError, match=said):
            pretrained.load_tokenizer(str(other))
    (path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        pretrained.load_tokenizer(str(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no file named"):
        load(path)


def test_a_file_that_a_recipe_wrote(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="not there"):
        pretrained.read_file(file)
    save_file({"a": torch.ones(3)}, file)
    assert pretrained.read_file(file)["a"].tolist() == [1, 1, 1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot be loaded"):
        pretrained.read_file(file)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = folder().module
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    first, *_ = whole
    loaded = pretrained.load_adapter(folder().module, tmp_path)
    assert torch.equal(peft.get_peft_model_state_dict(loaded)[first], whole[first])
    for other, said in (
        ({name: t for name, t in whole.items() if name != first}, f"lacks {first}"),
        (whole | {first.replace("q_proj", "up_proj"): torch.ones(2, 32)}, "no place for"),
        (whole | {first: whole[first][:1].clone()}, "size mismatch|has shape"),
    ):
        save_file(other, file)
        with pytest.raises(DataError, match=said):
            pretrained.load_adapter(folder().module, tmp_path)
    for data, said in ((POINTER, "git-lfs"), (b"", "empty"), (b"abc", "damaged")):
        file.write_bytes(data)
        with pytest.raises(DataError, match=said):
            pretrained.load_adapter(folder().module, tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="not there"):
        pretrained.load_adapter(folder().module, tmp_path)
