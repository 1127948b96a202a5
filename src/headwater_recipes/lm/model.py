"""The model: a Llama of transformers, in a few sizes, whose first values the servers draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

import headwater
from headwater import pretrained
from headwater.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096


class Size(NamedTuple):
    """``width`` of the residual stream, ``layers``, ``heads`` of 64 each, ``inner`` width of the MLP."""

    width: int
    layers: int
    heads: int
    inner: int


PRESETS = {
    "tiny": Size(64, 2, 1, 128),
    "6m": Size(256, 4, 4, 1024),
    "9m": Size(384, 3, 6, 1280),
    "12m": Size(384, 5, 6, 1024),
}
"""By their millions of parameters with the default vocabulary; ``tiny`` is for trying things out."""


def size(preset: str) -> Size:
    """Raises ``UsageError`` for an unknown preset."""
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r} is none of {', '.join(PRESETS)}; nothing was started")
    return PRESETS[preset]


def config(preset: str, vocabulary: int = VOCABULARY, context: int = 256) -> LlamaConfig:
    """A ``transformers.LlamaConfig``.

    Args:
        preset: a name in ``PRESETS``.
        vocabulary: number of tokens.
        context: the longest sequence, in tokens, that the model is trained on.

    Raises:
        UsageError: an unknown preset.
    """
    from transformers import LlamaConfig

    shape = size(preset)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def initialisers() -> dict[str, Any]:
    """For ``headwater.Optimizer(init=…)``: by glob pattern of parameter names, the first that fits counts."""
    return {"*norm.weight": headwater.init.ones(), "*": headwater.init.normal(0.02)}


def empty(configuration: LlamaConfig) -> LlamaForCausalLM:
    """The model without values: its parameters are on the meta device, for the servers to fill."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = _quick(LlamaForCausalLM(configuration))
    # The rotary frequencies are a buffer, computed when the module is made: no server holds them.
    model.model.rotary_emb = LlamaRotaryEmbedding(config=configuration)
    return cast("LlamaForCausalLM", model)


def load(folder: Path) -> LlamaForCausalLM:
    """The model of a run or checkpoint folder, in float32. Raises ``DataError`` if it is not whole."""
    from transformers import LlamaForCausalLM

    return cast("LlamaForCausalLM", _quick(pretrained.load(LlamaForCausalLM, str(folder), dtype=torch.float32)))


def _quick(model: Any) -> Any:
    # On a CPU and at a few hundred tokens, plain attention is faster than the fused kernel's backward.
    model.set_attn_implementation("eager")
    return model
