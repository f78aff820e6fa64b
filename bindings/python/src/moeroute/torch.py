"""The layer's steps for PyTorch, with gradients: choices by the library, derivatives of the weights and rows.

    >>> from moeroute import torch as moe
    >>> ids, weights = moe.route(router, logits)         # weights carry the gradient to the logits
    >>> y = moe.layer(router, gate_logits, x, experts)   # experts: modules or functions on rows

The choice is a constant: the gradient flows through the weights alone, and one choice that is divided by
its sum has none. Float32, bfloat16 and float16 rows go through the library's kernels; float64 is for
gradient checks and takes the same steps in torch.
"""

import math

import torch

from . import Assignment, Plan, balance_loss as _balance_loss
from . import combine as _combine
from . import dispatch as _dispatch
from .description import words_of

__all__ = ["route", "dispatch", "combine", "layer", "balance_loss", "weigh"]


def _words(router):
    return words_of(router, "moeroute.torch")


def weigh(router, logits, ids, per_expert_scale=None):
    """Weights of the chosen experts in torch's own operations: what route() differentiates.

    logits [T, E], ids [T, k]; -1 has weight 0. In float64 it is exact enough for gradient checks.
    """
    words = _words(router)
    z = logits / float(words.get("temperature", 1))
    # NaN counts as -inf, and -inf - -inf is no number.
    z = torch.where(z > -math.inf, z, torch.full_like(z, -3e38))
    cap = float(words.get("logit_softcap", 0))
    if cap:
        z = cap * torch.tanh(z / cap)
    there = ids >= 0
    at = ids.clamp(min=0).long()
    score, norm = words.get("score", "softmax"), words.get("normalize", "none")
    chosen = z.gather(1, at)
    plain = norm != "none" and words.get("eps_mode", "none") == "none"
    if score == "softmax" and (words.get("score_domain") == "selected" or plain):
        w = torch.softmax(chosen.masked_fill(~there, -math.inf), 1)
    elif score == "softmax":
        w = torch.softmax(z, 1).gather(1, at)
    elif score == "sigmoid":
        w = torch.sigmoid(chosen)
    elif score == "sqrtsoftplus":
        s = torch.nn.functional.softplus(chosen)
        w = torch.where(s > 0, torch.sqrt(torch.where(s > 0, s, torch.ones_like(s))), s)
    elif score == "relu":
        w = torch.relu(chosen)
    else:
        raise ValueError(f"moeroute.torch: score={score} has no derivative here")
    w = torch.where(there, w, torch.zeros_like(w))
    if norm != "none":
        p = float(words.get("lp_p", 1))
        divisor = w.pow(p).sum(1, keepdim=True).pow(1 / p)
        eps = float(words.get("eps", 0))
        if words.get("eps_mode") == "add":
            divisor = divisor + eps
        elif words.get("eps_mode") == "clamp":
            divisor = divisor.clamp(min=eps)
        positive = divisor > 0
        w = torch.where(positive, w / torch.where(positive, divisor, torch.ones_like(divisor)), torch.zeros_like(w))
    if "post_divide_by_k" in words:
        w = w / ids.shape[1]
    if words.get("scale_where", "weights") == "weights":
        w = w * float(words.get("scale", 1))
    if "per_expert_scale" in words:
        if per_expert_scale is None:
            raise ValueError("moeroute.torch: the router has a factor per expert: give per_expert_scale")
        w = w * per_expert_scale[at]
    return w


class _Weights(torch.autograd.Function):
    """The library's weights forward, the derivative of weigh() backward."""

    @staticmethod
    def forward(ctx, logits, router, ids, weights, scale):
        ctx.save_for_backward(logits, ids)
        ctx.router, ctx.scale = router, scale
        return weights

    @staticmethod
    def backward(ctx, dweights):
        logits, ids = ctx.saved_tensors
        with torch.enable_grad():
            z = logits.detach().float().requires_grad_()
            w = weigh(ctx.router, z, ids, ctx.scale)
            (dz,) = torch.autograd.grad(w, z, dweights)
        return dz.to(logits.dtype), None, None, None, None


def route(router, logits, *, per_expert_scale=None, **side):
    """ids [T, k] and weights [T, k], which carry a gradient to the logits. side: as of Router.route."""
    _words(router)
    values = logits.detach()
    chosen = router.route(values.float() if values.dtype == torch.float64 else values.contiguous(), **side)
    ids = torch.from_numpy(chosen.ids)
    if logits.dtype == torch.float64:
        return ids, weigh(router, logits, ids, per_expert_scale)
    return ids, _Weights.apply(logits, router, ids, torch.from_numpy(chosen.weights), per_expert_scale)


def _assignment(ids, weights, experts):
    return Assignment(ids.numpy(), weights.detach().float().contiguous().numpy(), experts)


def _place(plan, ids):
    token = torch.from_numpy(plan.token_of_slot).long()
    slot = torch.from_numpy(plan.slot_of_choice).long().reshape(ids.shape)
    return token, slot


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan):
        token = torch.from_numpy(plan.token_of_slot).long()
        ctx.save_for_backward(token)
        ctx.tokens = x.shape[0]
        if x.dtype == torch.float64:
            return torch.where((token >= 0)[:, None], x[token.clamp(min=0)], x.new_zeros(()))
        rows = torch.empty(plan.slots, x.shape[1], dtype=x.dtype)
        return _dispatch(x.detach().contiguous(), plan, out=rows)

    @staticmethod
    def backward(ctx, drows):
        (token,) = ctx.saved_tensors
        there = token >= 0
        dx = drows.new_zeros(ctx.tokens, drows.shape[1])
        return dx.index_add_(0, token[there], drows[there]), None


def dispatch(x, plan):
    """[slots, d] of x [T, d]: one contiguous block of rows per expert. Backward: the sum over a token's slots."""
    return _Dispatch.apply(x, plan)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, plan, ids):
        _, slot = _place(plan, ids)
        ctx.save_for_backward(rows, weights, slot)
        if rows.dtype == torch.float64:
            own = torch.where((slot >= 0)[..., None], rows[slot.clamp(min=0)], rows.new_zeros(()))
            return (own * weights[..., None]).sum(1)
        y = torch.empty(ids.shape[0], rows.shape[1], dtype=rows.dtype)
        return _combine(rows.detach().contiguous(), plan, _assignment(ids, weights, plan.experts), out=y)

    @staticmethod
    def backward(ctx, dy):
        rows, weights, slot = ctx.saved_tensors
        there = slot >= 0
        own = torch.where(there[..., None], rows[slot.clamp(min=0)], rows.new_zeros(()))
        dweights = (own * dy[:, None]).sum(2).to(weights.dtype)
        drows = torch.zeros_like(rows)
        share = (weights[..., None] * dy[:, None]).to(rows.dtype)
        drows[slot[there]] = share[there]
        return drows, dweights, None, None


def combine(rows, weights, plan, ids):
    """[T, d]: the weighted sum of every token's rows. Backward: to rows [slots, d] and weights [T, k]."""
    return _Combine.apply(rows, weights, plan, ids)


def layer(router, logits, x, experts, **side):
    """A whole layer: experts[e] is called on the rows [n, d] of expert e, where it has some."""
    if _words(router).get("weight_on") == "input":
        raise ValueError("moeroute.torch.layer: this router's weights go on the experts' inputs")
    if hasattr(experts, "__len__") and len(experts) < router.experts:
        raise ValueError(f"moeroute.torch.layer: experts has {len(experts)} entries, expected {router.experts}")
    ids, weights = route(router, logits, **side)
    plan = Plan(_assignment(ids, weights, router.experts))
    rows = dispatch(x, plan)
    ends = plan.offsets.tolist()
    blocks = [experts[e](rows[a:b]) for e, (a, b) in enumerate(zip(ends, ends[1:])) if b > a]
    out = torch.cat(blocks) if blocks else rows
    y = combine(out, weights.to(out.dtype), plan, ids)
    return y if router.routed_scale == 1 else y * router.routed_scale


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, assignment, options):
        values, dlogits = _balance_loss(logits.detach().float().contiguous(), assignment, **options)
        ctx.save_for_backward(torch.from_numpy(dlogits))
        return logits.new_tensor(sum(values.values()))

    @staticmethod
    def backward(ctx, dloss):
        (dlogits,) = ctx.saved_tensors
        return (dlogits * dloss).to(dlogits.dtype), None, None


def balance_loss(logits, ids, weights, **options):
    """The sum of the losses of moeroute.balance_loss (switch=, z=, sequence= ...), with its gradient."""
    return _Losses.apply(logits, _assignment(ids, weights, logits.shape[1]), options)
