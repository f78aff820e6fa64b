"""Routing for JAX on the CPU: a foreign function of XLA's, under jit, vmap and grad.

    >>> from moeroute import jax as moe
    >>> ids, weights = jax.jit(lambda z: moe.route(router, z))(logits)   # weights carry the gradient

The choice is a constant: the gradient flows through the weights alone, and one choice that is divided by
its sum has none. The library's kernel chooses and weighs; backward takes the same steps in jax.numpy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import _moeroute
from .description import words_of

if not hasattr(_moeroute, "_jax_route"):
    raise ImportError("moeroute.jax: this build has no handler for JAX: build it where jax is, or with "
                      "-DMOEROUTE_XLA_INCLUDE=$(python3 -c 'import jax; print(jax.ffi.include_dir())')")

__all__ = ["route", "weigh"]

jax.ffi.register_ffi_target("moeroute_route", _moeroute._jax_route(), platform="cpu")


def _words(router):
    return words_of(router, "moeroute.jax")


def weigh(router, logits, ids, per_expert_scale=None):
    """Weights of the chosen experts in jax.numpy: what route() differentiates. ids [T, k]; -1 has weight 0."""
    words = _words(router)
    z = logits / float(words.get("temperature", 1))
    # NaN counts as -inf, and -inf - -inf is no number.
    z = jnp.where(z > -jnp.inf, z, -3e38)
    cap = float(words.get("logit_softcap", 0))
    if cap:
        z = cap * jnp.tanh(z / cap)
    there = ids >= 0
    at = jnp.maximum(ids, 0)
    score, norm = words.get("score", "softmax"), words.get("normalize", "none")
    chosen = jnp.take_along_axis(z, at, 1)
    plain = norm != "none" and words.get("eps_mode", "none") == "none"
    if score == "softmax" and (words.get("score_domain") == "selected" or plain):
        w = jax.nn.softmax(jnp.where(there, chosen, -3e38), axis=1)
    elif score == "softmax":
        w = jnp.take_along_axis(jax.nn.softmax(z, axis=1), at, 1)
    elif score == "sigmoid":
        w = jax.nn.sigmoid(chosen)
    elif score == "sqrtsoftplus":
        s = jax.nn.softplus(chosen)
        w = jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), s)
    elif score == "relu":
        w = jax.nn.relu(chosen)
    else:
        raise ValueError(f"moeroute.jax: score={score} has no derivative here")
    w = jnp.where(there, w, 0)
    if norm != "none":
        p = float(words.get("lp_p", 1))
        # The root of 0 has no derivative, and there is nothing to divide.
        powers = (w if p == 1 else w**p).sum(1, keepdims=True)
        divisor = jnp.where(powers > 0, jnp.where(powers > 0, powers, 1) ** (1 / p), 0)
        eps = float(words.get("eps", 0))
        if words.get("eps_mode") == "add":
            divisor = divisor + eps
        elif words.get("eps_mode") == "clamp":
            divisor = jnp.maximum(divisor, eps)
        w = jnp.where(divisor > 0, w / jnp.where(divisor > 0, divisor, 1), 0)
    if "post_divide_by_k" in words:
        w = w / ids.shape[1]
    if words.get("scale_where", "weights") == "weights":
        w = w * float(words.get("scale", 1))
    if "per_expert_scale" in words:
        if per_expert_scale is None:
            raise ValueError("moeroute.jax: the router has a factor per expert: give per_expert_scale")
        w = w * jnp.asarray(per_expert_scale)[at]
    return w


def _call(router, logits, mask, token_ids, when):
    shape = (logits.shape[0], router.k)
    call = jax.ffi.ffi_call(
        "moeroute_route",
        (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)),
        vmap_method="sequential",
    )
    return call(logits, mask, token_ids, when, router=np.int64(_moeroute._jax_number(router)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(router, logits, mask, token_ids, when, scale):
    return _call(router, logits, mask, token_ids, when)


def _forward(router, logits, mask, token_ids, when, scale):
    ids, weights = _call(router, logits, mask, token_ids, when)
    return (ids, weights), (logits, ids, scale)


def _backward(router, kept, gradients):
    logits, ids, scale = kept
    _, back = jax.vjp(lambda z: weigh(router, z, ids, scale), logits.astype(jnp.float32))
    (dz,) = back(gradients[1])
    return dz.astype(logits.dtype), None, None, None, None


_route.defvjp(_forward, _backward)


def _list(name, given, tokens, dtype):
    if given is None:
        return jnp.zeros(0, dtype)
    given = jnp.asarray(given)
    if given.shape != (tokens,) or given.dtype != dtype:
        raise ValueError(f"moeroute::jax.route: {name} is {given.dtype}{list(given.shape)}, "
                         f"expected {jnp.dtype(dtype)}[{tokens}]")
    return given


def route(router, logits, *, mask=None, token_ids=None, seed=0, step=0, per_expert_scale=None):
    """ids int32 [T, k] and weights float32 [T, k], which carry a gradient to the logits [T, E].

    logits: float32, bfloat16 or float16; of float64 the choice is made in float32, the weights in jax.numpy.
    mask: [T] bool. token_ids: [T] int32. seed, step: uint32, of everything random. per_expert_scale: the
    router's own, for the gradient. A router that was used here stays as long as the process.
    """
    _words(router)
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] != router.columns:
        raise ValueError(f"moeroute::jax.route: logits has shape {list(logits.shape)}, "
                         f"expected [T, {router.columns}]")
    if logits.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise ValueError(f"moeroute::jax.route: logits is {logits.dtype}, expected float32, bfloat16, float16 or float64")
    mask = _list("mask", mask, logits.shape[0], jnp.bool_)
    token_ids = _list("token_ids", token_ids, logits.shape[0], jnp.int32)
    when = jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.asarray(step, jnp.uint32)])
    if logits.dtype == jnp.float64:
        ids, _ = _call(router, jax.lax.stop_gradient(logits).astype(jnp.float32), mask, token_ids, when)
        return ids, weigh(router, logits, ids, per_expert_scale)
    return _route(router, logits, mask, token_ids, when, per_expert_scale)
