"""A perceptron with dropout, Adam and a scheduler, after pytorch/examples/mnist."""

import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 64)
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(64, 4)

    def forward(self, x):
        return F.log_softmax(self.fc2(self.drop(F.relu(self.fc1(x)))), dim=1)


model = Net()
centres = torch.randn(4, 20)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
torch.manual_seed(1 + rank)
losses = []
for _epoch in range(3):
    model.train()
    for _ in range(10):
        target = torch.randint(4, (32,))
        data = centres[target] + torch.randn(32, 20)
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(centres).argmax(1) == torch.arange(4)).float().mean().item()
