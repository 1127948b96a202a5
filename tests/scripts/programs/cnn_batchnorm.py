"""A small ResNet with BatchNorm, SGD with Nesterov momentum and weight decay; the best model is kept."""

import copy
import os

import torch
from torch import nn
from torch.nn import functional as F

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), Block(8), nn.MaxPool2d(2), Block(8), nn.Flatten(), nn.Linear(8 * 16, 5)
)
classes = torch.randn(5, 3, 8, 8)
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
torch.manual_seed(1 + rank)
losses, best, best_state = [], -1.0, None
for _epoch in range(4):
    model.train()
    for _ in range(5):
        label = torch.randint(5, (16,))
        image = classes[label] + 0.5 * torch.randn(16, 3, 8, 8)
        loss = F.cross_entropy(model(image), label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    schedule.step()
    if (accuracy := -sum(losses[-5:])) > best or best_state is None:
        best, best_state = accuracy, copy.deepcopy(model.state_dict())
kept = copy.deepcopy(model)
