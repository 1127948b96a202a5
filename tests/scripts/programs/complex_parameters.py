"""A layer with complex weights, as in Fourier neural operators."""
#: within 1e-6 the servers step the real view, whose kernel rounds once where that of complex numbers rounds twice

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(9, dtype=torch.cfloat))
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=16))


model = Spectral()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.02, momentum=0.9)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    x = torch.randn(16, 16)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True) * 0.3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
