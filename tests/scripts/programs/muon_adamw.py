"""Muon for the hidden matrices, AdamW for the rest, as in the speed runs of nanoGPT."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 12))
hidden = [model[1].weight, model[3].weight]
others = [p for p in model.parameters() if all(p is not h for h in hidden)]
muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01)  #> headwater.Optimizer(model, torch.optim.Muon, hidden, lr=0.02, weight_decay=0.01)
adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95))  #> headwater.Optimizer(model, torch.optim.AdamW, others, lr=1e-2, betas=(0.9, 0.95))
torch.manual_seed(1 + rank)
losses = []
for step in range(15):
    for opt in (muon, adamw):
        for group in opt.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / 30)
    token = torch.randint(12, (32,))
    loss = nn.functional.cross_entropy(model(token), (token * 5 + 1) % 12)
    loss.backward()
    for opt in (muon, adamw):
        opt.step()
    model.zero_grad(set_to_none=True)
    losses.append(loss.item())
