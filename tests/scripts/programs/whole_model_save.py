"""torch.save of the whole model, read by a Python that does not know Headwater."""

import os
import subprocess
import sys

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
torch.manual_seed(1 + rank)
losses = []
for _ in range(10):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
path = f"whole{rank}.pt"
torch.save(model, path)
again = torch.load(path, weights_only=False)
code = "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); assert 'headwater' not in sys.modules; m(torch.ones(2, 6)).sum().backward()"
subprocess.run([sys.executable, "-c", code, path], check=True)
