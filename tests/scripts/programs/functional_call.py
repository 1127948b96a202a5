"""torch.func: MAML in its first-order form, through functional_call with adapted parameters."""

import os

import torch
from torch import nn
from torch.func import functional_call, grad

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []


def loss_of(parameters, x, y):
    return nn.functional.mse_loss(functional_call(model, parameters, (x,)), y)


for _ in range(20):
    parameters = dict(model.named_parameters())
    total = 0.0
    for phase in (0.0, 1.0):
        x = torch.rand(20, 1) * 4 - 2
        y = torch.sin(x + phase)
        inner = grad(loss_of)({name: p.detach() for name, p in parameters.items()}, x[:10], y[:10])
        adapted = {name: p - 0.1 * inner[name] for name, p in parameters.items()}
        total = total + loss_of(adapted, x[10:], y[10:])
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    losses.append(total.item())
