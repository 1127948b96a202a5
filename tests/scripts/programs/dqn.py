"""DQN: the target network is loaded from the online one now and then; the loss is Huber's."""

import os
import random

import torch
from torch import nn

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
random.seed(1 + rank)
policy_net = nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 2))
target_net = nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 2))
target_net.load_state_dict(policy_net.state_dict())
optimizer = torch.optim.AdamW(policy_net.parameters(), lr=1e-2, amsgrad=True)  #> headwater.Optimizer(policy_net, torch.optim.AdamW, lr=1e-2, amsgrad=True)
torch.manual_seed(1 + rank)
memory, losses = [], []
for step in range(40):
    state = torch.randn(1, 3)
    with torch.no_grad():
        greedy = policy_net(state).argmax(1).item()
    action = greedy if random.random() > 0.3 else random.randrange(2)
    memory.append((state, action, float((action == 0) == (state[0, 0] > 0)), torch.randn(1, 3)))
    if len(memory) < 16:
        continue
    batch = random.sample(memory, 16)
    states, following = torch.cat([b[0] for b in batch]), torch.cat([b[3] for b in batch])
    actions, rewards = torch.tensor([[b[1]] for b in batch]), torch.tensor([[b[2]] for b in batch])
    with torch.no_grad():
        expected = rewards + 0.5 * target_net(following).max(1, keepdim=True).values
    loss = nn.functional.smooth_l1_loss(policy_net(states).gather(1, actions), expected)
    optimizer.zero_grad()
    loss.backward()
    #: mean optimizer
    torch.nn.utils.clip_grad_value_(policy_net.parameters(), 100)
    optimizer.step()
    losses.append(loss.item())
    if step % 10 == 0:
        target_net.load_state_dict(policy_net.state_dict())
