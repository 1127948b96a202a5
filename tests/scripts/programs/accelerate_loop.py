"""Accelerate's own example: prepare, accumulate, clip when the gradients are in step, save."""
#: needs accelerate

import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

rank = int(os.environ.get("RANK", "0"))
set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
torch.manual_seed(1)
x = torch.randn(128, 8)
dataset = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 8)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
losses = []
for _epoch in range(2):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
model = accelerator.unwrap_model(model)
accelerator.save_model(model, f"saved{rank}")
