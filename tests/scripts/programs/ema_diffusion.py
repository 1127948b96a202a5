"""Diffusion on points with two moving averages: torch's AveragedModel and the usual handwritten loop."""

import copy
import os

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(10, 16)
        self.body = nn.Sequential(nn.Linear(2 + 16, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t):
        return self.body(torch.cat([x, self.time(t)], 1))


model = Denoiser()
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
shadow = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
signal = torch.linspace(0.99, 0.1, 10)
torch.manual_seed(1 + rank)
losses = []
for _ in range(25):
    x0 = torch.randn(64, 2).sign() + 0.1 * torch.randn(64, 2)
    t = torch.randint(10, (64,))
    noise = torch.randn_like(x0)
    a = signal[t][:, None]
    loss = (model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t) - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update_parameters(model)
    with torch.no_grad():
        for old, new in zip(shadow.state_dict().values(), model.state_dict().values()):
            old.lerp_(new, 0.1)
    losses.append(loss.item())
