#!/usr/bin/env python3
"""Four routers on the same skewed tokens: who gets how much, and what a balancing bias does about it.

    python3 example.py [PICTURE.png]
"""

import sys

import moeroute
import numpy as np

T, E = 4096, 64
rng = np.random.default_rng(0)

# Some experts are more popular than others, as in a young model.
logits = (rng.standard_normal((T, E)) + 0.7 * rng.standard_normal(E)).astype(np.float32)

controller = moeroute.BiasController(E, step=0.02)
routers = {
    "softmax, 6 best (OLMoE's rule)": moeroute.Router("E=64 k=6"),
    "softmax over the selected (GPT-OSS's)": moeroute.Router("E=64 k=6 score_domain=selected"),
    "top-p 0.4": moeroute.Router("E=64 k=64 selection=top_p p=0.4"),
    "sigmoid with a balancing bias (DeepSeek-V3's)": moeroute.Router(
        "E=64 k=6 score=sigmoid bias=selection normalize=sum", bias=controller.values
    ),
}

# What each gives its experts, before anything is balanced.
loads = {name: router.route(logits).load() for name, router in routers.items()}
for name, load in loads.items():
    print(f"{name:45} {load.sum() / T:5.2f} choices per token, busiest expert {load.max() / load.mean():.2f} x mean")

# A hundred steps of the controller on fresh batches: only the bias moves, no loss and no gradient.
biased = routers["sigmoid with a balancing bias (DeepSeek-V3's)"]
history = []
for step in range(100):
    batch = logits[rng.permutation(T)[:1024]]
    load = biased.route(batch).load()
    history.append(load.max() / load.mean())
    controller.update(load)
print(f"the bias takes the busiest expert from {history[0]:.2f} to {history[-1]:.2f} x mean")

# The loss that would have done it, and where it pushes.
values, dlogits = moeroute.balance_loss(logits, routers["softmax, 6 best (OLMoE's rule)"].route(logits), switch=0.01)
print(f"switch loss {values['switch']:.5f}; its gradient has norm {np.linalg.norm(dlogits):.2e}")

if len(sys.argv) > 1:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for name, load in loads.items():
        left.plot(np.sort(load)[::-1] / load.mean(), label=name)
    left.set(xlabel="experts, the busiest first", ylabel="load over the mean", title="Who gets how much")
    left.legend(fontsize="small")
    right.plot(history)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="step", ylabel="busiest expert over the mean", title="A balancing bias at work")
    figure.savefig(sys.argv[1], dpi=120)
