"""TD3, after cleanrl: twin critics under one optimizer, target networks by polyak averages, a delayed actor."""

import copy
import os

import torch
from torch import nn
from torch.nn import functional as F

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class QNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 32)
        self.fc2 = nn.Linear(32, 1)

    def forward(self, x, a):
        return self.fc2(F.relu(self.fc1(torch.cat([x, a], 1))))


actor = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2), nn.Tanh())
qf1, qf2 = QNetwork(), QNetwork()
target_actor, qf1_target, qf2_target = copy.deepcopy(actor), QNetwork(), QNetwork()
qf1_target.load_state_dict(qf1.state_dict())
qf2_target.load_state_dict(qf2.state_dict())
q_optimizer = torch.optim.Adam(list(qf1.parameters()) + list(qf2.parameters()), lr=1e-2)  #> headwater.Optimizer([qf1, qf2], torch.optim.Adam, lr=1e-2)
actor_optimizer = torch.optim.Adam(list(actor.parameters()), lr=1e-3)  #> headwater.Optimizer(actor, torch.optim.Adam, lr=1e-3)
torch.manual_seed(1 + rank)
losses = []
for step in range(20):
    state, action, following = torch.randn(32, 4), torch.rand(32, 2) * 2 - 1, torch.randn(32, 4)
    reward = -(state[:, :2] - action).square().sum(1, keepdim=True)
    with torch.no_grad():
        a = target_actor(following)
        q_next = torch.min(qf1_target(following, a), qf2_target(following, a))
        target = reward + 0.5 * q_next
    loss = F.mse_loss(qf1(state, action), target) + F.mse_loss(qf2(state, action), target)
    q_optimizer.zero_grad()
    loss.backward()
    q_optimizer.step()
    losses.append(loss.item())
    if step % 2 == 0:
        actor_loss = -qf1(state, actor(state)).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        for net, target_net in ((actor, target_actor), (qf1, qf1_target), (qf2, qf2_target)):
            for param, target_param in zip(net.parameters(), target_net.parameters()):
                target_param.data.copy_(0.05 * param.data + 0.95 * target_param.data)
