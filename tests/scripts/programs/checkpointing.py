"""Reentrant checkpointing of a layer that is used several times."""

import os

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Universal(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(6, 16)
        self.shared = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        x = self.inward(x)
        for turn in range(3):
            x = checkpoint(self.shared, x, use_reentrant=turn != 1)
        return self.out(x)


model = Universal()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
