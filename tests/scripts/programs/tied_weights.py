"""A language model whose head is the embedding's weight."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=0)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, token):
        return self.head(torch.tanh(self.body(self.embedding(token))))


model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  #> headwater.Optimizer(model, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for _ in range(20):
    token = torch.randint(1, 20, (32,))
    loss = nn.functional.cross_entropy(model(token), token * 7 % 20)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert model.head.weight is model.embedding.weight
