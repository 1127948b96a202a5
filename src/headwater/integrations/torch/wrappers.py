"""Models inside other modules: ``torch.compile``'s, DistributedDataParallel's, a list. Names are the model's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from headwater.errors import UsageError

_COMPILED = "_orig_mod"


def unwrapped(model: Any) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """The model itself, and those of its wrappers that would reduce gradients over processes, which is ours to do.

    ``model``: a module, or several in a list or mapping.

    Raises:
        UsageError: something else, or a wrapper that cuts parameters into shards.
    """
    reducing: list[torch.nn.Module] = []
    while isinstance(model, torch.nn.Module):
        kind = type(model).__name__
        if kind in ("FullyShardedDataParallel", "FSDPModule") or hasattr(model, "_fsdp_wrapped_module") or _cut(model):
            raise UsageError(
                "the model is wrapped in FSDP, which shards its parameters over the workers itself; Headwater keeps "
                "them on its servers. Give it the model without the wrapper"
            )
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            reducing.append(model)
            model = model.module
        elif isinstance(model, torch.nn.DataParallel):
            model = model.module
        elif _COMPILED in getattr(model, "_modules", {}):
            model = model._modules[_COMPILED]  # noqa: SLF001 - torch.compile's wrapper has no other way in
        else:
            return model, reducing
    return _together(model), reducing


def _cut(model: torch.nn.Module) -> bool:
    """FSDP2 mixes its class into the module's."""
    return any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)


def _together(models: Any) -> torch.nn.Module:
    if isinstance(models, Mapping) and models and all(isinstance(m, torch.nn.Module) for m in models.values()):
        return torch.nn.ModuleDict({str(key): unwrapped(model)[0] for key, model in models.items()})
    if isinstance(models, list | tuple) and models and all(isinstance(m, torch.nn.Module) for m in models):
        return torch.nn.ModuleList([unwrapped(model)[0] for model in models])
    raise UsageError(
        f"headwater.Optimizer takes the model first, not {type(models).__name__}: parameters are known by their "
        "names in it. Parameter groups go into params=[{'params': …, 'lr': …}, …]"
    )


def clean(name: str) -> str:
    """A name as the model has it, where submodules were compiled: without ``_orig_mod``."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """As ``model.named_parameters()``, each tensor once, with clean names."""
    return {clean(name): p for name, p in model.named_parameters()}


def take_over(
    wrappers: Iterable[torch.nn.Module], held: Callable[[], Collection[int]], say: Callable[[str], None]
) -> None:
    """Gradients are reduced once: by the servers, no more by DistributedDataParallel.

    ``held``: the ids of parameters that servers have. A wrapper around others too goes on: the mean of its means is it.
    """
    for wrapper in wrappers:
        rest = {id(p) for p in wrapper.parameters() if p.requires_grad}.difference(held())
        if wrapper.require_backward_grad_sync and not rest:
            wrapper.require_backward_grad_sync = False  # type: ignore[assignment]
            say("the servers reduce gradients; DistributedDataParallel, which wraps the model, does not any more")


class LateWrapperHook:
    """The forward pre-hook that notices that DistributedDataParallel was put around the model later."""

    def __init__(self, held: Callable[[], Collection[int]], say: Callable[[str], None]) -> None:
        self._held = held
        self._say = say

    def __call__(self, _module: torch.nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        active = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]  # noqa: SLF001
        if active is not None:
            take_over([active], self._held, self._say)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    """What becomes of the hook in a copied model."""
    return _inert


def _inert(*_args: Any) -> None:
    pass
