"""A LightningModule and its Trainer, with accumulation and clipping."""
#: needs pytorch_lightning

import os
import warnings

import pytorch_lightning as pl
import torch
from torch import nn

warnings.filterwarnings("ignore")


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        self.seen, self.steps = [], 0

    def training_step(self, batch, _index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.seen.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.steps += 1
        #: mean optimizer

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)  #> headwater.Optimizer(self, torch.optim.Adam, lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


if __name__ == "__main__":
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    x = torch.randn(128, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    torch.manual_seed(9)
    model = Regression()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    losses = model.seen
