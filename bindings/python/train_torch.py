#!/usr/bin/env python3
"""A mixture of experts learns in PyTorch what one expert of that size cannot: a different map for every region.

    python3 train_torch.py            # needs torch
"""

import moeroute
import torch
from moeroute import torch as moe

T, d, E, steps = 512, 16, 8, 200
torch.manual_seed(0)

# Every region of the inputs has a linear map of its own.
maps, centres = torch.randn(E, d, d) / d**0.5, 3 * torch.randn(E, d)


def batch():
    region = torch.randint(E, (T,))
    x = centres[region] + 0.5 * torch.randn(T, d)
    return x, torch.einsum("td,tde->te", x, maps[region])


class MoE(torch.nn.Module):
    """DeepSeek-V3's rule: sigmoids, a bias for the choice, weights divided by their sum."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(d, E, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(d, d) for _ in range(E))
        # The bias balances without a loss: it follows the load, and the router reads it where it is.
        self.balance = moeroute.BiasController(E, step=0.01)
        self.router = moeroute.Router(f"E={E} k=2 score=sigmoid bias=selection normalize=sum", bias=self.balance.values)

    def forward(self, x):
        logits = self.gate(x)
        ids, weights = moe.route(self.router, logits)
        choices = moeroute.Assignment(ids.numpy(), weights.detach().numpy(), E)
        self.load = choices.load()
        plan = moeroute.Plan(choices)
        rows = moe.dispatch(x, plan)
        ends = plan.offsets.tolist()
        rows = torch.cat([self.experts[e](rows[a:b]) for e, (a, b) in enumerate(zip(ends, ends[1:]))])
        return moe.combine(rows, weights, plan, ids), moe.balance_loss(logits, ids, weights, z=1e-3)


model, dense = MoE(), torch.nn.Linear(d, d)
optimisers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, dense)]
for step in range(steps + 1):
    x, target = batch()
    y, extra = model(x)
    loss, alone = (y - target).square().mean(), (dense(x) - target).square().mean()
    for optimiser in optimisers:
        optimiser.zero_grad()
    (loss + extra + alone).backward()
    for optimiser in optimisers:
        optimiser.step()
    model.balance.update(model.load)
    if step % 50 == 0:
        busiest = model.load.max() / model.load.mean()
        print(f"step {step:3}: mixture {loss.item():.4f}, one expert {alone.item():.4f}, busiest {busiest:.2f} x mean")
