"""y = β0 + β1 x1 + … + βn xn + ε, learnt through a parameter server by any number of workers.

headwater run --workers 3 examples/linear_regression.py
python examples/linear_regression.py        # alone: the server is in this process
"""

import torch

import headwater

n, rows = 5, 3000
truth = torch.arange(n + 1) - 2.5
generator = torch.Generator().manual_seed(0)
x = torch.cat([torch.ones(rows, 1), torch.randn(rows, n, generator=generator)], 1)  # the ones are for β0
y = x @ truth + 0.1 * torch.randn(rows, generator=generator)

with headwater.connect() as ps:
    mine_x, mine_y = x[ps.rank :: ps.world], y[ps.rank :: ps.world]
    beta = ps.dense("beta", (n + 1,), optimizer=torch.optim.SGD, lr=0.2, momentum=0.5, sync=headwater.Bulk())
    for _ in range(60):
        error = mine_x @ beta.pull() - mine_y
        beta.push(mine_x.T @ error / len(mine_y))
    learnt = beta.pull()
    ps.barrier()

closed_form = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
if ps.rank == 0:
    print("        learnt  closed form")
    for i, (ours, exact) in enumerate(zip(learnt.tolist(), closed_form.tolist(), strict=True)):
        print(f"β{i}  {ours:10.5f}   {exact:10.5f}")
torch.testing.assert_close(learnt, closed_form, rtol=1e-4, atol=1e-4)
