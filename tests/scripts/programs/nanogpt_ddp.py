"""A small GPT in nanoGPT's shape: under RANK it joins a process group and wraps its model, accumulates and clips."""

import math
import os
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

ddp = int(os.environ.get("RANK", -1)) != -1
if ddp:
    init_process_group(backend="gloo")
    ddp_rank, ddp_world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seed_offset, master_process = ddp_rank, ddp_rank == 0
else:
    seed_offset, master_process, ddp_world_size = 0, True, 1
gradient_accumulation_steps, max_iters, learning_rate, grad_clip = 2, 12, 1e-2, 1.0


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (z.view(b, t, 2, c // 2).transpose(1, 2) for z in self.c_attn(self.ln_1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocab=16, width=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(8, width)
        self.h = nn.ModuleList([Block(width), Block(width)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_groups(self, weight_decay):
        decay = [p for p in self.parameters() if p.dim() >= 2]
        nodecay = [p for p in self.parameters() if p.dim() < 2]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": nodecay, "weight_decay": 0.0}]


torch.manual_seed(1337)
model = GPT()
groups = model.configure_groups(0.1)
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))  #> headwater.Optimizer(model, torch.optim.AdamW, groups, lr=learning_rate, betas=(0.9, 0.95))
torch.manual_seed(1337 + seed_offset)
if ddp:
    model = DDP(model)
raw_model = model.module if ddp else model


def get_batch():
    start = torch.randint(16, (8, 1))
    data = (start + 3 * torch.arange(9)) % 16
    return data[:, :-1], data[:, 1:]


losses = []
for iter_num in range(max_iters):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * iter_num / max_iters)))
    for micro_step in range(gradient_accumulation_steps):
        if ddp:
            model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1
        with nullcontext():
            X, Y = get_batch()
            logits, loss = model(X, Y)
            loss = loss / gradient_accumulation_steps
        loss.backward()
    #: mean optimizer
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
if master_process:
    torch.save({"model": raw_model.state_dict(), "optimizer": optimizer.state_dict()}, "ckpt.pt")
if ddp:
    destroy_process_group()
del model
