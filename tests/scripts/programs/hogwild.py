"""mnist_hogwild: the script's own processes train one shared model. Headwater cannot take part, and says so."""
#: raises UsageError

import torch
import torch.multiprocessing as mp
from torch import nn


def train(number, model):
    torch.manual_seed(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  #> headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
    for _ in range(5):
        x = torch.randn(8, 4)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    mp.set_start_method("spawn")
    model = nn.Linear(4, 1)
    model.share_memory()
    processes = [mp.Process(target=train, args=(number, model)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)
