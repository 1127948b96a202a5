"""DataLoader workers are forked, and so is a child that writes a checkpoint and exits."""

import os
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Points(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        rank = int(os.environ.get("RANK", "0"))
        x = torch.randn(4, generator=torch.Generator().manual_seed(2 * index + rank))
        return x, x.sum(0, keepdim=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
    loader = DataLoader(Points(), batch_size=16, num_workers=2)
    losses = []
    for epoch in range(3):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        pid = os.fork()
        if pid == 0:
            torch.save(model.state_dict(), f"epoch{epoch}-{os.environ.get('RANK', '0')}.pt")
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    saved = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    saved.load_state_dict(torch.load(f"epoch2-{os.environ.get('RANK', '0')}.pt"))
