"""The averaged weights are copied into the model for an evaluation, and the trained ones restored afterwards."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
valid = torch.randn(32, 6)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
shadow = [p.detach().clone() for p in model.parameters()]
torch.manual_seed(1 + rank)
losses, scores = [], []
for step in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    for s, p in zip(shadow, model.parameters()):
        s.sub_(0.1 * (s - p.data))
    if step % 5 == 4:
        backup = [p.detach().clone() for p in model.parameters()]
        for s, p in zip(shadow, model.parameters()):
            p.data.copy_(s.data)
        with torch.no_grad():
            scores.append(nn.functional.mse_loss(model(valid), valid.sum(1, keepdim=True)).item())
        for b, p in zip(backup, model.parameters()):
            p.data.copy_(b)
seen = nn.Parameter(torch.tensor(scores))
