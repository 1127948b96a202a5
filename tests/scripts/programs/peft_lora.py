"""LoRA by peft on a small transformer; only adapters train, and are saved by save_pretrained."""
#: needs peft transformers

import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
shape = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
base = LlamaForCausalLM(LlamaConfig(**shape))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)  #> headwater.Optimizer(model, torch.optim.AdamW, lr=5e-2)
torch.manual_seed(1 + rank)
losses = []
for step in range(10):
    ids = (torch.arange(12) * 3 + torch.randint(2, (4, 1))) % 32
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained(f"adapter{rank}")
assert os.path.getsize(f"adapter{rank}/adapter_model.safetensors") < 20_000
merged = model.merge_and_unload()
