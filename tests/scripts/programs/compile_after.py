"""torch.compile after the optimizer was made."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
compiled = torch.compile(model, backend="aot_eager")
torch.manual_seed(1 + rank)
losses = []
for _ in range(12):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(compiled(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
graphs = nn.Parameter(torch.tensor([float(frames)]))
