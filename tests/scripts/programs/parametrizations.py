"""weight_norm and spectral_norm: the module's weight is computed from other parameters, and from buffers."""

import os

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(weight_norm(nn.Linear(6, 20)), nn.ReLU(), weight_norm(nn.Linear(20, 1)))
critic = spectral_norm(nn.Linear(6, 6), n_power_iterations=1)
critic.eval()  # the same vectors on all ranks
whole = nn.ModuleList([model, critic])
optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)  #> headwater.Optimizer(whole, torch.optim.SGD, lr=0.05)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(critic(x) + x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
