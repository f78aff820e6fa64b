"""Mixture-of-experts routing for CPUs, bit-true to the routers of published models.

    >>> import moeroute, numpy as np
    >>> router = moeroute.Router("mixtral")            # softmax, the best two of eight, sum 1
    >>> ids, weights = router.route(np.random.randn(4, 8).astype(np.float32))

Rows go in without a copy from NumPy and from anything that speaks DLPack (torch, JAX) on the CPU. A
call holds no lock of the interpreter while it runs, and starts no thread. What is wrong is a
ValueError with the library's sentence.
"""

from ._moeroute import (
    Assignment,
    BatchPlan,
    BiasController,
    ExpertCache,
    Gate,
    Placement,
    Plan,
    Router,
    SoftPlan,
    __version__,
    balance_exactly,
    balance_loss,
    combine,
    count_moves,
    describe,
    dispatch,
    eplb,
    isa,
    isas,
    models,
    placement_bound,
    relabel,
    replan,
    search_placement,
    simulate_cache,
    spill,
    transfers,
    use_isa,
)

__all__ = [
    "Assignment",
    "BatchPlan",
    "BiasController",
    "ExpertCache",
    "Gate",
    "Placement",
    "Plan",
    "Router",
    "SoftPlan",
    "__version__",
    "balance_exactly",
    "balance_loss",
    "combine",
    "count_moves",
    "describe",
    "dispatch",
    "eplb",
    "isa",
    "isas",
    "models",
    "placement_bound",
    "relabel",
    "replan",
    "search_placement",
    "simulate_cache",
    "spill",
    "transfers",
    "use_isa",
]
