"""A variational autoencoder with a learnt prior: a bare nn.Parameter beside the layers, ParameterList, buffers."""

import os

import torch
from torch import nn
from torch.nn import functional as F

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 2 * 2), nn.Linear(2, 8)
        self.prior = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))])
        self.register_buffer("mask", torch.full((8, 8), torch.finfo(torch.float32).min).triu(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, x):
        self.steps += 1
        mean, log_var = self.encoder(x @ self.mask.softmax(1)).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        kl = 0.5 * ((mean - self.prior[0]).square() + log_var.exp() - log_var - 1 + self.prior[1].square()).sum(1)
        return F.mse_loss(self.decoder(z), x) + 0.01 * kl.mean()


model = VAE()
optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adamax, lr=1e-2)
mask = model.mask.clone()
torch.manual_seed(1 + rank)
losses = []
for _ in range(25):
    loss = model.loss(torch.randn(32, 2) @ torch.ones(2, 8))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert torch.equal(model.mask, mask)
assert model.steps >= 25, model.steps  # under Stale and Async workers count together
