"""Train, save, begin anew, load the model after the optimizer (as pytorch/examples/imagenet does), go on."""

import io
import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
losses = []
file = io.BytesIO()
for part in range(2):
    torch.manual_seed(part)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    if part == 1:
        checkpoint = torch.load(io.BytesIO(file.getvalue()))
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    torch.manual_seed(10 + 2 * part + rank)
    for _ in range(10):
        x = torch.randn(8, 4)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    if part == 0:
        state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "scheduler": scheduler.state_dict()}, file)
