"""imagenet/main.py: the learning rate by position, adjusted by hand, evaluation by another module that shares layers."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
features, classifier = nn.Linear(6, 16), nn.Linear(16, 3)
model = nn.Sequential(features, nn.ReLU(), classifier)
probe = nn.Sequential(features, nn.Identity())
centres = torch.randn(3, 6)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)  #> headwater.Optimizer(model, torch.optim.SGD, model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
torch.manual_seed(1 + rank)
losses, probes = [], []
for epoch in range(3):
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.1 * 0.1**epoch
    for _ in range(8):
        label = torch.randint(3, (16,))
        loss = nn.functional.cross_entropy(model(centres[label] + 0.3 * torch.randn(16, 6)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            probes.append(probe(centres).norm().item())
seen = nn.Parameter(torch.tensor(probes))
