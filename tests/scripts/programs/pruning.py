"""torch.nn.utils.prune in the middle of training: weight becomes weight_orig and a mask, then permanent."""

import os

import torch
from torch import nn
from torch.nn.utils import prune

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    if step == 8:
        prune.l1_unstructured(model[0], "weight", amount=0.3)
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
