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
    BiasController,
    Gate,
    Plan,
    Router,
    SoftPlan,
    __version__,
    balance_loss,
    combine,
    describe,
    dispatch,
    isa,
    isas,
    models,
    use_isa,
)

__all__ = [
    "Assignment",
    "BiasController",
    "Gate",
    "Plan",
    "Router",
    "SoftPlan",
    "__version__",
    "balance_loss",
    "combine",
    "describe",
    "dispatch",
    "isa",
    "isas",
    "models",
    "use_isa",
]
