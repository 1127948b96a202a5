"""Random scripts: sequences of what people do between two steps, run in plain torch and through the servers.

A script of several workers is compared with one process that plays all of them: it accumulates each rank's gradients,
shows everybody who looks the mean (in rank order), and steps by what rank 0 then has.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Word = tuple[str, int]
"""What is done, and a seed for it."""


def model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    return made


@dataclass
class Script:
    """One worker's: its model, its optimizer, and what it has kept of gradients."""

    rank: int
    make: Callable[[nn.Module], torch.optim.Optimizer]
    kept: list[list[torch.Tensor | None]] = field(default_factory=list)
    state: dict[str, Any] | None = None
    waiting: torch.Tensor | None = None
    left: list[torch.Tensor] | None = None
    flat: torch.Tensor = field(default_factory=lambda: torch.zeros(1))

    def __post_init__(self) -> None:
        self.model = model()
        self.optimizer = self.make(self.model)

    def say(self, word: str, seed: int) -> None:
        getattr(self, word)(torch.Generator().manual_seed(10 * seed + self.rank))

    @property
    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    # ---- the words -------------------------------------------------------------------------------

    def backward(self, generator: torch.Generator) -> None:
        _back(self.model(torch.randn(4, 5, generator=generator)).square().mean())

    def half(self, generator: torch.Generator) -> None:
        """Only a part of the model."""
        _back(self.model[2](torch.randn(4, 7, generator=generator)).square().mean())

    def twice(self, generator: torch.Generator) -> None:
        """Two losses of one graph."""
        out = self.model(torch.randn(4, 5, generator=generator))
        _back(out.mean(), retain_graph=True)
        _back(out.square().mean())

    def gathered(self, generator: torch.Generator) -> None:
        """Under ``no_sync``, where there is one, and then not."""
        if hasattr(self.optimizer, "no_sync"):
            with self.optimizer.no_sync():
                self.backward(generator)
        else:
            self.backward(generator)
        self.backward(generator)

    def step(self, _generator: torch.Generator) -> None:
        stepped = [p for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        if type(self.optimizer) is torch.optim.AdamW:  # its fused kernel does not tell autograd, as all others do
            torch.autograd.graph.increment_version(stepped)

    def zero(self, _generator: torch.Generator) -> None:
        self.optimizer.zero_grad()

    def zero_in_place(self, _generator: torch.Generator) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def zero_the_model(self, _generator: torch.Generator) -> None:
        self.model.zero_grad(set_to_none=False)

    def forget_one(self, _generator: torch.Generator) -> None:
        self.model[0].weight.grad = None

    def give_one(self, _generator: torch.Generator) -> None:
        self.model[2].weight.grad = torch.ones(3, 7)

    def give_own(self, _generator: torch.Generator) -> None:
        """Buffers of the script's, which it zeroes itself."""
        self.flat = torch.zeros(sum(p.numel() for p in self.model.parameters()))
        parts = self.flat.split([p.numel() for p in self.model.parameters()])
        for p, part in zip(self.model.parameters(), parts, strict=True):
            p.grad = part.view_as(p)

    def zero_own(self, _generator: torch.Generator) -> None:
        self.flat.zero_()

    def clip(self, _generator: torch.Generator) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def clip_values(self, _generator: torch.Generator) -> None:
        if self.gradients:  # torch refuses none
            torch.nn.utils.clip_grad_value_(self.model.parameters(), 0.05)

    def scale_data(self, _generator: torch.Generator) -> None:
        for gradient in self.gradients:
            gradient.data.mul_(0.5)

    def unscale(self, _generator: torch.Generator) -> None:
        """As ``GradScaler`` does it, past autograd's version counter."""
        found = torch.zeros(1)
        if self.gradients:
            torch._amp_foreach_non_finite_check_and_unscale_(self.gradients, found, torch.tensor([0.25]))

    def replace(self, _generator: torch.Generator) -> None:
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad = p.grad * 2

    def norm(self, _generator: torch.Generator) -> None:
        total = math.fsum(gradient.norm().item() for gradient in self.gradients)  # some may stand for others': zeros
        self.kept.append([torch.tensor(total)])

    def keep(self, _generator: torch.Generator) -> None:
        self.kept.append([p.grad for p in self.model.parameters()])

    def write(self, _generator: torch.Generator) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.clamp_(-0.3, 0.3)

    def write_nothing(self, _generator: torch.Generator) -> None:
        with torch.no_grad():
            self.model[0].weight.mul_(1.0)

    def write_data(self, _generator: torch.Generator) -> None:
        for p in self.model.parameters():
            p.data.mul_(0.9)

    def write_new_data(self, _generator: torch.Generator) -> None:
        for p in self.model.parameters():
            p.data = p.data * 1.1

    def write_numpy(self, _generator: torch.Generator) -> None:
        self.model[0].weight.detach().numpy()[0] *= 2

    def load(self, _generator: torch.Generator) -> None:
        self.model.load_state_dict({name: value * 0.8 for name, value in self.model.state_dict().items()})

    def freeze(self, _generator: torch.Generator) -> None:
        self.model[0].requires_grad_(False)

    def unfreeze(self, _generator: torch.Generator) -> None:
        self.model[0].requires_grad_(True)

    def freeze_last(self, _generator: torch.Generator) -> None:
        self.model[2].requires_grad_(False)

    def unfreeze_last(self, _generator: torch.Generator) -> None:
        self.model[2].requires_grad_(True)

    def forward(self, generator: torch.Generator) -> None:
        """Its backward comes later, if at all."""
        self.waiting = self.model(torch.randn(4, 5, generator=generator)).square().mean()

    def finish(self, _generator: torch.Generator) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None and waiting.requires_grad:
            with contextlib.suppress(RuntimeError):  # something was written in between: torch refuses
                waiting.backward()

    def swap(self, _generator: torch.Generator) -> None:
        """Other memory; what was there is kept."""
        if self.left is None:
            self.left = [p.data for p in self.model.parameters()]
            for p in self.model.parameters():
                p.data = p.data * 0.5

    def swap_back(self, _generator: torch.Generator) -> None:
        left, self.left = self.left, None
        for p, data in zip(self.model.parameters(), left or (), strict=left is not None):
            p.data = data

    def save(self, _generator: torch.Generator) -> None:
        self.state = copy.deepcopy(self.optimizer.state_dict())

    def restore(self, _generator: torch.Generator) -> None:
        if self.state is not None:
            self.optimizer.load_state_dict(self.state)

    def slow_down(self, _generator: torch.Generator) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.5

    # ---- what came of it -------------------------------------------------------------------------

    def outcome(self) -> list[torch.Tensor | None]:
        kept = [None if g is None else g.detach().clone() for some in self.kept for g in some]
        return [*(p.detach().clone() for p in self.model.parameters()), *kept]


def _back(loss: torch.Tensor, **options: bool) -> None:
    if loss.requires_grad:  # not all is frozen
        loss.backward(**options)  # type: ignore[no-untyped-call]


LOOKS = frozenset({"clip", "clip_values", "scale_data", "unscale", "replace", "norm"})
BACKWARD = frozenset({"backward", "half", "twice", "gathered"})


class Several:
    """The reference: all ranks in one process.

    By parameter: ``lazy``, ``.grad`` is a worker's share of what the servers merge, and whoever looks sees the mean;
    ``spent``, a step has used it; ``own``, it is the script's tensor, which shows the mean from every backward on.
    ``met``: all ranks have this step's mean, or what they made of it.
    """

    def __init__(self, world: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.scripts = [Script(rank, make) for rank in range(world)]
        count = len(list(self.scripts[0].model.parameters()))
        self.lazy, self.spent = [False] * count, [True] * count
        self.own = [False] * count
        self.met = False
        self.shown: Any = None  # of this step's mean: what each rank had before, and the mean

    def say(self, word: str, seed: int) -> None:
        if word == "step":
            self._step(seed)
            return
        if word in LOOKS:
            self._meet()
        if word in BACKWARD:
            self._take_back()
        for script in self.scripts:
            script.say(word, seed)
        present = [p.grad is not None for p in self.scripts[0].model.parameters()]
        self.own = [(own or word == "replace") and here for own, here in zip(self.own, present, strict=True)]
        self.own[2] = self.own[2] or word == "give_one"
        if word in BACKWARD:
            self.met = False
            for index in range(2 if word == "half" else 0, len(present)):
                self.lazy[index] = True
                self.spent[index] = False
            reached = self.own[2:] if word == "half" else self.own
            if any(reached):
                self._meet()
        if word in ("zero_in_place", "zero_the_model"):
            self.lazy = [False] * len(present)
        if word == "give_one":
            self.lazy[2] = False
        self.lazy = [lazy and here for lazy, here in zip(self.lazy, present, strict=True)]

    def _means(self) -> list[torch.Tensor | None]:
        means: list[torch.Tensor | None] = []
        for same in zip(*(script.model.parameters() for script in self.scripts), strict=True):
            total = None
            for gradient in (p.grad for p in same if p.grad is not None):
                total = gradient.clone() if total is None else total + gradient
            means.append(None if total is None else total / len(self.scripts))
        return means

    def _meet(self) -> None:
        if not any(self.lazy):
            return
        past = all(spent for spent, lazy in zip(self.spent, self.lazy, strict=True) if lazy)
        means = self._means()
        own = [[p.grad for p in script.model.parameters()] for script in self.scripts]
        for script in self.scripts:
            for p, mean, lazy in zip(script.model.parameters(), means, self.lazy, strict=True):
                if lazy or not past:
                    p.grad = None if mean is None else mean.clone()
        self.lazy = [False] * len(self.lazy)
        self.met = self.met or not past
        self.shown = None if past else (own, means)

    def _take_back(self) -> None:
        """The mean was only looked at: what backward adds to is each rank's own again."""
        shown, self.shown = self.shown, None
        if not self.met or shown is None or any(self.own):
            return
        own, means = shown
        for script in self.scripts:
            for p, mean in zip(script.model.parameters(), means, strict=True):
                if (p.grad is None) != (mean is None) or not (p.grad is None or torch.equal(p.grad, mean)):
                    return
        for script, gradients in zip(self.scripts, own, strict=True):
            for p, gradient in zip(script.model.parameters(), gradients, strict=True):
                p.grad = gradient
        self.lazy = [gradient is not None for gradient in own[0]]

    def _step(self, seed: int) -> None:
        own = [[p.grad for p in script.model.parameters()] for script in self.scripts]
        used = own[0] if self.met else self._means()
        for script in self.scripts:
            for p, gradient in zip(script.model.parameters(), used, strict=True):
                p.grad = None if gradient is None else gradient.clone()
            script.say("step", seed)
        for script, gradients in zip(self.scripts, own, strict=True):
            for p, gradient in zip(script.model.parameters(), gradients, strict=True):
                p.grad = gradient
        self.met, self.spent, self.shown = False, [True] * len(self.spent), None


def run_alone(words: Sequence[Word], make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[torch.Tensor | None]:
    script = Script(0, make)
    for word, seed in words:
        script.say(word, seed)
    return script.outcome()
