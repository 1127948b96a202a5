"""Hooks of the script's own: on tensors, on modules, after accumulation, before and after the optimizer's step."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
model[0].weight.register_hook(lambda grad: grad * 0.5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
model[2].bias.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
seen = {"forward": 0, "backward": 0, "accumulated": 0, "before": 0, "after": 0}


def count(what):
    def hook(*_):
        seen[what] += 1

    return hook


model[0].register_forward_hook(count("forward"))
model.register_full_backward_hook(count("backward"))
model[2].weight.register_post_accumulate_grad_hook(count("accumulated"))
optimizer.register_step_pre_hook(count("before"))
optimizer.register_step_post_hook(count("after"))
torch.manual_seed(1 + rank)
losses = []
for _ in range(12):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert set(seen.values()) == {12}, seen
