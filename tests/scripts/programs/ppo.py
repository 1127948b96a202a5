"""PPO after cleanrl: several epochs of minibatches over one rollout, annealed learning rate, clipping, one agent."""
#: learns no

import os

import torch
from torch import nn
from torch.distributions import Normal

rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor_mean = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor_logstd = nn.Parameter(torch.zeros(1, 1))
        for layer in (self.critic[0], self.actor_mean[0]):
            nn.init.orthogonal_(layer.weight, 2**0.5)

    def get_action_and_value(self, x, action=None):
        mean = self.actor_mean(x)
        choice = Normal(mean, self.actor_logstd.expand_as(mean).exp())
        action = choice.sample() if action is None else action
        return action, choice.log_prob(action).sum(1), choice.entropy().sum(1), self.critic(x)


agent = Agent()
optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3, eps=1e-5)  #> headwater.Optimizer(agent, torch.optim.Adam, lr=3e-3, eps=1e-5)
torch.manual_seed(1 + rank)
for update in range(4):
    optimizer.param_groups[0]["lr"] = (1.0 - update / 4) * 3e-3
    with torch.no_grad():
        obs = torch.randn(32, 3)
        actions, old, _, values = agent.get_action_and_value(obs)
        returns = -(actions - obs[:, :1]).square()
        advantages = (returns - values)[:, 0]
    for _epoch in range(2):
        order = torch.randperm(32)
        for start in range(0, 32, 16):
            mb = order[start : start + 16]
            _, new, entropy, value = agent.get_action_and_value(obs[mb], actions[mb])
            ratio = (new - old[mb]).exp()
            adv = (advantages[mb] - advantages[mb].mean()) / (advantages[mb].std() + 1e-8)
            pg_loss = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).mean()
            loss = pg_loss - 0.01 * entropy.mean() + 0.5 * (value - returns[mb]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            #: mean optimizer
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
