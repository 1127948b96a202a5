"""Each group of parameters is clipped by its own norm, and the head's gradients get noise and are scaled."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.ModuleDict({"body": nn.Linear(6, 20), "head": nn.Linear(20, 2)})
groups = [{"params": list(model["body"].parameters()), "lr": 0.05}, {"params": list(model["head"].parameters())}]
optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)  #> headwater.Optimizer(model, torch.optim.SGD, groups, lr=0.1, momentum=0.5)
torch.manual_seed(1 + rank)
same = torch.Generator().manual_seed(5)
losses = []
for _ in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model["head"](torch.relu(model["body"](x))), x[:, :2])
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    #: mean optimizer
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 0.3)
    for p in model["head"].parameters():
        p.grad.data.mul_(0.5)
        p.grad += 1e-3 * torch.randn(p.shape, generator=same)
    optimizer.step()
    losses.append(loss.item())
