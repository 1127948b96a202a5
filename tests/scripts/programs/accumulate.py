"""Gradient accumulation as every tutorial writes it, with a shorter last round and an evaluation in between."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=5e-3, weight_decay=0.1)
centres = torch.randn(3, 6)
torch.manual_seed(1 + rank)
losses = []
accumulation_steps, batches = 4, 30
for i in range(batches):
    label = torch.randint(3, (8,))
    loss = nn.functional.cross_entropy(model(centres[label] + 0.3 * torch.randn(8, 6)), label)
    losses.append(loss.item())
    (loss / accumulation_steps).backward()
    if (i + 1) % accumulation_steps == 0 or i + 1 == batches:
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(centres)
