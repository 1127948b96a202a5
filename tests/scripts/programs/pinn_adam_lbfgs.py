"""A physics-informed network: both optimizers are made at once, Adam steps first, then L-BFGS refines."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
adam = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, tolerance_grad=0.0, tolerance_change=0.0)  #> headwater.Optimizer(model, torch.optim.LBFGS, lr=0.1, max_iter=3, tolerance_grad=0.0, tolerance_change=0.0)
torch.manual_seed(1 + rank)
points = torch.rand(32, 1).requires_grad_(True)
losses = []


def residual():
    u = model(points)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    return (slope + u).square().mean() + (model(torch.zeros(1, 1)) - 1).square().mean()


for _ in range(15):
    adam.zero_grad()
    loss = residual()
    loss.backward()
    adam.step()
    losses.append(loss.item())
for _ in range(4):

    def closure():
        lbfgs.zero_grad()
        loss = residual()
        loss.backward()
        return loss

    losses.append(lbfgs.step(closure).item())
points.requires_grad_(False)
