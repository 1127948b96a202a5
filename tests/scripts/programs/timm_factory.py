"""A factory makes the optimizer, with weight decay for matrices only, as timm's create_optimizer_v2 does."""

import os

import torch
from torch import nn


def param_groups_weight_decay(model, weight_decay):
    decay, no_decay = [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        (no_decay if param.ndim <= 1 or name.endswith(".bias") else decay).append(param)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def create_optimizer(model, opt, lr, weight_decay):
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "nadam": torch.optim.NAdam}
    return kinds[opt](param_groups_weight_decay(model, weight_decay), lr=lr)


rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
optimizer = create_optimizer(model, "nadam", 1e-2, 0.05)  #> headwater.wrap(create_optimizer(model, "nadam", 1e-2, 0.05), model)
centres = torch.randn(4, 6)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    label = torch.randint(4, (32,))
    loss = nn.functional.cross_entropy(model(centres[label] + 0.5 * torch.randn(32, 6)), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
