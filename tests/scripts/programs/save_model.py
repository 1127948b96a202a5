"""safetensors.save_model in the middle of training, a part's state_dict, pickle, share_memory; then training goes on."""
#: learns no

import io
import os
import pickle

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=1e-3)
torch.manual_seed(1 + rank)
losses = []
for step in range(10):
    x = torch.randn(16, 64)
    loss = nn.functional.mse_loss(model(x), x[:, :2])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step == 5:
        save_model(model, f"model{rank}.safetensors")
        head = io.BytesIO()
        torch.save(model[2].state_dict(), head)
        unpickled = pickle.loads(pickle.dumps(model))
assert sorted(load_file(f"model{rank}.safetensors")) == ["0.bias", "0.weight", "2.bias", "2.weight"]
assert head.tell() < 8000, head.tell()
loaded = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
load_model(loaded, f"model{rank}.safetensors")
part = nn.Linear(64, 2)
part.load_state_dict(torch.load(io.BytesIO(head.getvalue())))
model.share_memory()
