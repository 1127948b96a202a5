"""A script that knows nothing of ranks: one more line shares its loader."""
#: workers 1

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(64, 5)
model = nn.Linear(5, 1)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)  #> headwater.shard(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
losses = []
for _epoch in range(3):
    for inputs, target in loader:
        loss = nn.functional.mse_loss(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
