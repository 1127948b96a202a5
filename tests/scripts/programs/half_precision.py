"""Parameters in bfloat16, a frozen float32 part, and a rank-dependent number of epochs' worth of evaluation."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
body = nn.Linear(6, 32).requires_grad_(False)
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).bfloat16()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
torch.manual_seed(1 + rank)
losses = []
for _ in range(15):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(body(x).bfloat16()).float(), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    for _ in range(rank + 1):
        with torch.inference_mode():
            model(body(x).bfloat16())
