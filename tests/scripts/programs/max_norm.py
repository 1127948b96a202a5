"""Max-norm: rows of a weight are scaled back after each step, and a dead unit is re-initialised once."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9)
centres = torch.randn(3, 6)
same = torch.Generator().manual_seed(9)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    label = torch.randint(3, (16,))
    loss = nn.functional.cross_entropy(model(centres[label] + 0.5 * torch.randn(16, 6)), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight.copy_(torch.renorm(model[0].weight, 2, 0, 0.8))
        if step == 10:
            nn.init.normal_(model[2].weight, std=0.1, generator=same)
            model[2].bias.zero_()
    losses.append(loss.item())
