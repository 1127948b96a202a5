"""Two losses of one forward pass, two backward passes with retain_graph; the second loss is there every other step."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
trunk, left, right = nn.Linear(6, 20), nn.Linear(20, 1), nn.Linear(20, 2)
model = nn.ModuleList([trunk, left, right])
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    x = torch.randn(16, 6)
    feature = torch.tanh(trunk(x))
    one = nn.functional.mse_loss(left(feature), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    one.backward(retain_graph=True)
    if step % 2:
        two = nn.functional.mse_loss(right(feature), x[:, :2])
        (0.5 * two).backward()
    optimizer.step()
    losses.append(one.item())
