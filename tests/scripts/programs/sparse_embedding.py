"""Sparse gradients of an embedding, under SparseAdam, beside Adam for the rest."""

import os

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
embedding, head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 20)
sparse = torch.optim.SparseAdam(embedding.parameters(), lr=1e-2)  #> headwater.Optimizer(embedding, torch.optim.SparseAdam, lr=1e-2)
dense = torch.optim.Adam(head.parameters(), lr=1e-2)  #> headwater.Optimizer(head, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []
for _ in range(15):
    token = torch.randint(20, (16,))
    loss = nn.functional.cross_entropy(head(embedding(token)), (token + 1) % 20)
    sparse.zero_grad()
    dense.zero_grad()
    loss.backward()
    sparse.step()
    dense.step()
    losses.append(loss.item())
