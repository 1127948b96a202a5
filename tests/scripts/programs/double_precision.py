"""The default type is float64, deterministic algorithms are on, the learning rate is a tensor, the sign is turned."""

import os

import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True)
rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05), maximize=True)  #> headwater.Optimizer(model, torch.optim.SGD, lr=torch.tensor(0.05), maximize=True)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    (-loss).backward()
    optimizer.step()
    losses.append(loss.item())
assert model[0].weight.dtype == torch.float64
