"""A model in channels_last stays so."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
model = model.to(memory_format=torch.channels_last)
classes = torch.randn(4, 3, 8, 8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    label = torch.randint(4, (16,))
    image = (classes[label] + 0.3 * torch.randn(16, 3, 8, 8)).to(memory_format=torch.channels_last)
    loss = nn.functional.cross_entropy(model(image), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
