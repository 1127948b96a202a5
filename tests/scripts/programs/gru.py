"""A recurrent network over packed sequences, with a hidden state that is carried on and detached."""

import os

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 16, num_layers=2, batch_first=True)
        self.out = nn.Linear(16, 1)

    def forward(self, x, lengths, hidden):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, hidden = self.gru(packed, hidden)
        return self.out(pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]), hidden.detach()


model = Tagger()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses, hidden = [], None
for _ in range(15):
    x = torch.randn(8, 5, 4)
    lengths = torch.randint(2, 6, (8,))
    y, hidden = model(x, lengths, hidden)
    mask = (torch.arange(5) < lengths[:, None]).float()
    loss = ((y[..., 0] - x.cumsum(1).mean(2)).square() * mask).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
