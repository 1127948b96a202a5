"""A LightningModule with two optimizers, optimized by hand."""
#: needs pytorch_lightning

import os
import warnings

import pytorch_lightning as pl
import torch
from torch import nn

warnings.filterwarnings("ignore")


class GAN(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, _index):
        (real,) = batch
        g, c = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        self.toggle_optimizer(c)
        loss = nn.functional.softplus(self.critic(fake.detach())).mean()
        loss = loss + nn.functional.softplus(-self.critic(real)).mean()
        c.zero_grad()
        self.manual_backward(loss)
        c.step()
        self.untoggle_optimizer(c)
        self.toggle_optimizer(g)
        loss = nn.functional.softplus(-self.critic(fake)).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()
        self.untoggle_optimizer(g)

    def configure_optimizers(self):
        g = torch.optim.Adam(self.generator.parameters(), lr=1e-2)  #> headwater.Optimizer(self.generator, torch.optim.Adam, lr=1e-2)
        c = torch.optim.Adam(self.critic.parameters(), lr=1e-2)  #> headwater.Optimizer(self.critic, torch.optim.Adam, lr=1e-2)
        return [g, c]


if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(9)
    model = GAN()
    torch.manual_seed(rank)
    data = torch.utils.data.TensorDataset(1 + 0.1 * torch.randn(64, 2))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
