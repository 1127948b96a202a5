"""REINFORCE in pytorch/examples' shape: one step per episode, episodes of unequal length, log probabilities kept."""
#: learns no

import os

import torch
from torch import nn
from torch.distributions import Categorical

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)  #> headwater.Optimizer(policy, torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
for _ in range(10):
    saved, rewards, state = [], [], torch.randn(4)
    for _ in range(int(torch.randint(3, 9, ()))):
        choice = Categorical(logits=policy(state))
        action = choice.sample()
        saved.append(choice.log_prob(action))
        rewards.append(float((action == 0) == (state[0] > 0)))
        state = torch.randn(4)
    returns, total = [], 0.0
    for reward in reversed(rewards):
        total = reward + 0.9 * total
        returns.insert(0, total)
    returns = torch.tensor(returns)
    returns = (returns - returns.mean()) / (returns.std() + 1e-6)
    optimizer.zero_grad()
    torch.stack([-a * b for a, b in zip(saved, returns)]).sum().backward()
    optimizer.step()
