"""WGAN-GP: the penalty is a gradient of a gradient."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2, betas=(0.0, 0.9))  #> headwater.Optimizer(critic, torch.optim.Adam, lr=1e-2, betas=(0.0, 0.9))
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    real, fake = 1 + 0.1 * torch.randn(16, 2), torch.randn(16, 2)
    mixed = (fake + torch.rand(16, 1) * (real - fake)).requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = (slope.norm(2, dim=1) - 1).square().mean()
    loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
