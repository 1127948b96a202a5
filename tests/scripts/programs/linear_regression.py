"""Linear regression, as in the first chapter of every book."""

import os

import torch

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = torch.nn.Linear(5, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
torch.manual_seed(1 + rank)
truth = torch.arange(5.0)[:, None]
losses = []
for _ in range(30):
    x = torch.randn(16, 5)
    loss = torch.nn.functional.mse_loss(model(x), x @ truth)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
