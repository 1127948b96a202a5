"""Tiny random models for the engine's tests, a tokenizer of bytes, and a client that keeps what it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from headwater.gateway.engine import Engine, EngineHandle
from headwater.gateway.engine_types import Event, Failed, GenerationEnded, GenerationRequest, Token
from headwater.gateway.hf import ModelFolder
from headwater.gateway.sources import MemorySource
from headwater.types import VersionInfo
from tests.patience import PATIENCE

VOCABULARY = 260
EOS = 257


def tokenizer() -> Any:
    """One token per byte, as byte-level BPE without merges; then <pad>, <eos> and two more special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<pad>", "<eos>", "<user>", "<bot>"])
    fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return fast


def _llama() -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=True,
    )


def _qwen2() -> Any:
    return transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.6,
        eos_token_id=EOS,
        bos_token_id=None,
    )


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.6,
        eos_token_id=EOS,
        bos_token_id=None,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2}


def folder(kind: str = "llama", seed: int = 0, positions: int = 256, **options: Any) -> ModelFolder:
    """A model of random values that answers differently to every prompt."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.max_position_embeddings = positions
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return ModelFolder(kind, module, tokenizer(), **options)


def values(seed: int, kind: str = "llama") -> dict[str, Tensor]:
    """All parameters of another such model, as a version holds them."""
    return {name: p.detach().clone() for name, p in folder(kind, seed).module.named_parameters()}


def reference(
    prompt: Sequence[int], count: int, tensors: Mapping[str, Tensor] | None = None, kind: str = "llama"
) -> Any:
    """What ``transformers`` generates alone, greedily: on the values of ``folder(kind)``, or on a version of it."""
    module: Any = folder(kind).module
    module.load_state_dict(dict(tensors or {}), strict=False)
    module.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = module.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=256
        )
    return out[0, len(prompt) :].tolist()


class Client:
    """Keeps the events of one request; ``on_token`` hears, on the engine's thread, how many tokens there are."""

    def __init__(self, on_token: Callable[[int], object] = lambda _: None) -> None:
        self.tokens: list[Token] = []
        self.end: GenerationEnded | Failed | None = None
        self._on_token = on_token
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        assert self.end is None, f"{event} after the end"
        if isinstance(event, Token):
            self.tokens.append(event)
            self._on_token(len(self.tokens))
        else:
            self.end = event
            self._ended.set()

    def wait(self) -> GenerationEnded | Failed:
        assert self._ended.wait(PATIENCE), "no end"
        assert self.end
        return self.end

    def finished(self) -> GenerationEnded:
        end = self.wait()
        assert isinstance(end, GenerationEnded), end
        return end

    def error(self) -> Exception:
        end = self.wait()
        assert isinstance(end, Failed), end
        return end.error

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def greedy(prompt: Sequence[int], count: int, **options: Any) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), count, temperature=0.0, **{"ignore_eos": True, **options})


def ask(engine: Engine, request: GenerationRequest, client: Client | None = None) -> tuple[Client, EngineHandle]:
    client = client or Client()
    return client, engine.submit(request, client)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


class Swapper:
    """An engine on a source whose publications can be waited for on the engine's own thread."""

    def __init__(self, model: ModelFolder, source: MemorySource, **options: object) -> None:
        self.source = source
        self.engine = Engine(model, source, **{"slots": 6, "queue": 100, "chunk": 16, "retry": 0.01, **options})  # type: ignore[arg-type]
        self._follower = self.engine._follower
        self._ready = threading.Event()
        wake = self._follower._wake

        def woken() -> None:
            self._ready.set()
            wake()

        self._follower._wake = woken

    def publish(self, tensors: dict[str, Tensor]) -> VersionInfo:
        """Publish and wait until the version is ready: the next step takes it."""
        self._ready.clear()
        info = self.source.publish(tensors)
        assert self._ready.wait(PATIENCE)
        return info
