"""Stochastic weight averaging with SWALR, and update_bn at the end."""

import os

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 1))
batches = [torch.randn(16, 6) for _ in range(4)]
swa_model = AveragedModel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
swa_scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
torch.manual_seed(1 + rank)
losses = []
for epoch in range(5):
    for x in batches:
        x = x + 0.1 * torch.randn_like(x)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if epoch >= 2:
        swa_model.update_parameters(model)
        swa_scheduler.step()
update_bn(batches, swa_model)
