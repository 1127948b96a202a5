"""L-BFGS with a line search, which looks at the loss."""
#: workers 1

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=5, line_search_fn="strong_wolfe")  #> headwater.Optimizer(model, torch.optim.LBFGS, lr=1.0, max_iter=5, line_search_fn="strong_wolfe")
x = torch.randn(32, 3)
y = torch.sin(x.sum(1, keepdim=True))
losses = []
for _ in range(5):

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses.append(optimizer.step(closure).item())
