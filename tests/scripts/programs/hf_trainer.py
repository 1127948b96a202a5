"""Hugging Face's Trainer with accumulation and its own clipping; it gets the optimizer and a scheduler."""
#: needs transformers

import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_linear_schedule_with_warmup, set_seed

set_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    use_cache=False,
)
model = LlamaForCausalLM(config)
rank = int(os.environ.get("RANK", "0"))
data = []
for i in range(64):
    ids = (torch.arange(12) * (1 + i % 3) + i) % 32
    data.append({"input_ids": ids, "labels": ids})
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=5e-3)
args = TrainingArguments(
    "out",
    max_steps=6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    logging_steps=1,
    seed=0,
)
trainer = Trainer(
    model, args, train_dataset=data, optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 2, 6))
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
