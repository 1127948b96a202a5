"""torch.compile (inductor) before the optimizer is made, and a warm-up; the optimizer gets the compiled module."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 1))
model = torch.compile(model)
model(torch.zeros(16, 6))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
torch.manual_seed(1 + rank)
losses = []
for _ in range(12):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
names = [name.removeprefix("_orig_mod.") for name in model.state_dict()]
