"""An optimizer for each layer, of different kinds, stepped in a loop."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
kinds = [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad]
optimizers = []
for kind, layer in zip(kinds, [model[0], model[2], model[4]]):
    one = kind(layer.parameters(), lr=0.01)  #> headwater.Optimizer(layer, kind, lr=0.01)
    optimizers.append(one)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    for one in optimizers:
        one.zero_grad()
    loss.backward()
    for one in optimizers:
        one.step()
    losses.append(loss.item())
