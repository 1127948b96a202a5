"""L-BFGS: step() calls the closure several times. Both tolerances are 0, so that all ranks take the same number."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, tolerance_grad=0.0, tolerance_change=0.0)  #> headwater.Optimizer(model, torch.optim.LBFGS, lr=0.1, max_iter=4, tolerance_grad=0.0, tolerance_change=0.0)
torch.manual_seed(1 + rank)
x = torch.randn(32, 3)
y = torch.sin(x.sum(1, keepdim=True))
losses = []
for _ in range(8):

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses.append(optimizer.step(closure).item())
