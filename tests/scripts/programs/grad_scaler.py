"""Mixed precision with a GradScaler, unscale_ and clipping; the first steps overflow and are skipped on all ranks."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=4)
torch.manual_seed(1 + rank)
losses, scales = [], []
for step in range(24):
    x = torch.randn(16, 10)
    y = x.sum(1, keepdim=True)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.mse_loss(model(x).float(), y)
    if step == 12 and rank == 0:
        loss = loss * float("inf")  # an overflow on one rank
    scaler.scale(loss).backward()
    #: mean optimizer
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    scales.append(scaler.get_scale())
    if loss.isfinite():
        losses.append(loss.item())
