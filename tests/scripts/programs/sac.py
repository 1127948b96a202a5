"""Soft actor–critic: the temperature is a tensor of the script's own, beside the modules, with its own optimizer."""

import os

import torch
from torch import nn
from torch.nn import functional as F

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
actor = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2))
critic = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
critic_target = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
critic_target.load_state_dict(critic.state_dict())
log_alpha = torch.zeros(1, requires_grad=True)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)  #> headwater.Optimizer(critic, torch.optim.Adam, lr=1e-2)
actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)  #> headwater.Optimizer(actor, torch.optim.Adam, lr=1e-3)
alpha_optimizer = torch.optim.Adam([log_alpha], lr=1e-2)  #> headwater.Optimizer([log_alpha], torch.optim.Adam, lr=1e-2)
torch.manual_seed(1 + rank)
losses = []


def act(state):
    mean, log_std = actor(state).chunk(2, 1)
    noise = torch.randn_like(mean)
    action = torch.tanh(mean + log_std.clamp(-5, 2).exp() * noise)
    return action, -0.5 * noise.square() - log_std - torch.log(1 - action.square() + 1e-6)


for _ in range(15):
    state, following = torch.randn(32, 3), torch.randn(32, 3)
    action = torch.rand(32, 1) * 2 - 1
    reward = -(state[:, :1] - action).square()
    alpha = log_alpha.exp().item()
    with torch.no_grad():
        next_action, log_prob = act(following)
        target = reward + 0.5 * (critic_target(torch.cat([following, next_action], 1)) - alpha * log_prob)
    critic_loss = F.mse_loss(critic(torch.cat([state, action], 1)), target)
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    losses.append(critic_loss.item())

    action, log_prob = act(state)
    actor_loss = (alpha * log_prob - critic(torch.cat([state, action], 1))).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()

    alpha_loss = -(log_alpha.exp() * (log_prob.detach() - 1.0)).mean()
    alpha_optimizer.zero_grad()
    alpha_loss.backward()
    alpha_optimizer.step()
    with torch.no_grad():
        for param, target_param in zip(critic.parameters(), critic_target.parameters()):
            target_param.mul_(0.95).add_(param, alpha=0.05)
