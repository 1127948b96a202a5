"""WGAN: the critic's weights are clipped after each of its steps, by p.data.clamp_."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
net_g = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
net_d = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer_d = torch.optim.RMSprop(net_d.parameters(), lr=5e-3)  #> headwater.Optimizer(net_d, torch.optim.RMSprop, lr=5e-3)
optimizer_g = torch.optim.RMSprop(net_g.parameters(), lr=5e-3)  #> headwater.Optimizer(net_g, torch.optim.RMSprop, lr=5e-3)
torch.manual_seed(1 + rank)
for i in range(20):
    fake = net_g(torch.randn(16, 4)).detach()
    loss_d = net_d(fake).mean() - net_d(1 + 0.1 * torch.randn(16, 2)).mean()
    optimizer_d.zero_grad()
    loss_d.backward()
    optimizer_d.step()
    for p in net_d.parameters():
        p.data.clamp_(-0.1, 0.1)
    if i % 3 == 0:
        loss_g = -net_d(net_g(torch.randn(16, 4))).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
