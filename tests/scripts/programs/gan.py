"""DCGAN's loop: two optimizers, the generator's loss runs backward through the discriminator."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
net_g = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(True), nn.Linear(32, 2), nn.Tanh())
net_d = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2, inplace=True), nn.Linear(32, 1))
criterion = nn.BCEWithLogitsLoss()
optimizer_d = torch.optim.Adam(net_d.parameters(), lr=2e-3, betas=(0.5, 0.999))  #> headwater.Optimizer(net_d, torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
optimizer_g = torch.optim.Adam(net_g.parameters(), lr=2e-3, betas=(0.5, 0.999))  #> headwater.Optimizer(net_g, torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
torch.manual_seed(1 + rank)
for _ in range(12):
    # (1) maximize log(D(x)) + log(1 - D(G(z)))
    net_d.zero_grad()
    real = 0.5 + 0.1 * torch.randn(16, 2)
    error_real = criterion(net_d(real), torch.ones(16, 1))
    error_real.backward()
    fake = net_g(torch.randn(16, 8))
    error_fake = criterion(net_d(fake.detach()), torch.zeros(16, 1))
    error_fake.backward()
    optimizer_d.step()
    # (2) maximize log(D(G(z))): its backward leaves gradients in D, which the next zero_grad() forgets
    net_g.zero_grad()
    error_g = criterion(net_d(fake), torch.ones(16, 1))
    error_g.backward()
    optimizer_g.step()
