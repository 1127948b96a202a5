"""A plain DistributedDataParallel script: DistributedSampler, all_reduce of a metric, barrier, rank 0 saves."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

distributed = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
if distributed:
    dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1))
x = torch.randn(96, 6)
dataset = TensorDataset(x, x.sum(1, keepdim=True))
sampler = DistributedSampler(dataset) if distributed else None
loader = DataLoader(dataset, batch_size=8, sampler=sampler)
model = DistributedDataParallel(net) if distributed else net
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
losses = []
for epoch in range(2):
    if sampler is not None:
        sampler.set_epoch(epoch)
    for inputs, targets in loader:
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metric = loss.detach().clone()
        if distributed:
            dist.all_reduce(metric)
        losses.append(metric.item())
if distributed:
    dist.barrier()
    dist.destroy_process_group()
del model
