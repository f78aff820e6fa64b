"""Plans, rows, gates, losses and balance against the formulas written out in NumPy."""

import moeroute
import numpy as np
import pytest

rng = np.random.default_rng(5)


def routed(tokens=30, experts=8, k=2):
    z = rng.standard_normal((tokens, experts)).astype(np.float32)
    return z, moeroute.Router(f"E={experts} k={k} normalize=sum").route(z)


def softmax(z):
    p = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_a_layer_is_the_weighted_sum_of_its_experts(tokens):
    _, a = routed(tokens)
    x = rng.standard_normal((tokens, 16)).astype(np.float32)
    plan = moeroute.Plan(a)
    rows = moeroute.dispatch(x, plan)
    assert rows.shape == (plan.slots, 16) == (2 * tokens, 16)
    factor = 1.0 + np.arange(8)
    for e in range(8):
        rows[plan.offsets[e] : plan.offsets[e + 1]] *= factor[e]
    y = moeroute.combine(rows, plan, a)
    expected = x * (a.weights * factor[a.ids]).sum(1, keepdims=True) if tokens else x
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_slots_are_in_expert_order_and_stable():
    _, a = routed()
    plan = moeroute.Plan(a)
    flat = a.ids.ravel()
    order = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(plan.token_of_slot, order // 2)
    np.testing.assert_array_equal(plan.loads, np.bincount(flat, minlength=8))
    np.testing.assert_array_equal(plan.slot_of_choice[order], np.arange(60))
    np.testing.assert_array_equal(a.load(), np.bincount(flat, minlength=8))
    np.testing.assert_array_equal(a.load(first_only=True), np.bincount(a.ids[:, 0], minlength=8))


def test_blocks_are_padded():
    _, a = routed()
    plan = moeroute.Plan(a, block=4)
    assert (np.diff(plan.offsets) % 4 == 0).all()
    assert (np.diff(plan.offsets) == (plan.loads + 3) // 4 * 4).all()
    sorted_ids, experts = plan.aligned_blocks(4, tail_expert=-1)
    assert len(sorted_ids) == plan.slots and len(experts) == plan.slots // 4
    np.testing.assert_array_equal(sorted_ids[plan.slot_of_choice], np.arange(60))


def test_dispatch_and_combine_write_where_they_are_told():
    _, a = routed()
    x = rng.standard_normal((30, 16)).astype(np.float32)
    plan = moeroute.Plan(a)
    wide = np.zeros((plan.slots, 40), np.float32)
    out = wide[:, :16]
    assert moeroute.dispatch(x, plan, out=out) is out
    np.testing.assert_array_equal(out, x[plan.token_of_slot])
    assert (wide[:, 16:] == 0).all()
    half = np.zeros((plan.slots, 16), np.float16)
    moeroute.dispatch(x, plan, out=half)
    np.testing.assert_array_equal(half, x.astype(np.float16)[plan.token_of_slot])
    y = np.ones((30, 16), np.float32)
    moeroute.combine(out, plan, a, out=y, accumulate=True)
    np.testing.assert_allclose(y, 1 + x * a.weights.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_capacity_drops_what_finds_its_expert_full():
    z = np.tile(np.array([[3, 2, 1, 0]], np.float32), (10, 1))
    a = moeroute.Router("E=4 k=2").route(z)
    assert a.kept is None
    result = a.apply_capacity(formula="fixed", count=3)
    assert result == {"capacity": 3, "kept": 6, "dropped": 14, "unrouted": 0}
    np.testing.assert_array_equal(a.kept.sum(0), [3, 3])
    assert (a.weights[3:] == 0).all() and (a.ids[3:] == [0, 1]).all()
    np.testing.assert_array_equal(a.load(kept_only=True), [3, 3, 0, 0])
    y = moeroute.combine(np.ones((6, 2), np.float32), moeroute.Plan(a), a, x=np.full((10, 2), 7, np.float32))
    assert (y[3:] == 7).all()


def test_a_gate_is_a_product():
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((20, 48), (12, 48), (12,)))
    np.testing.assert_allclose(moeroute.Gate(w, b)(x), x @ w.T + b, rtol=1e-4, atol=1e-4)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    cosine = (x @ unit.T) / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(moeroute.Gate(unit).cosine(x, 5.0), 5 * cosine, rtol=1e-4, atol=1e-4)


def test_a_soft_mixture():
    z = rng.standard_normal((10, 6)).astype(np.float32)
    x = rng.standard_normal((10, 4)).astype(np.float32)
    plan = moeroute.SoftPlan(z, slots_per_expert=2)
    np.testing.assert_allclose(plan.dispatch_weights, softmax(z.T), rtol=1e-5)
    np.testing.assert_allclose(plan.combine_weights, softmax(z), rtol=1e-5)
    slots = plan.dispatch(x)
    np.testing.assert_allclose(slots, softmax(z.T) @ x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(plan.combine(slots), softmax(z) @ slots, rtol=1e-4, atol=1e-5)


def losses(z, counts, k, switch, zed):
    p = softmax(z)
    tokens, experts = z.shape
    top = z.max(1).astype(np.float64)
    lse = top + np.log(np.exp(z - top[:, None]).sum(1))
    return {
        "switch": switch * experts * (p.sum(0) * counts).sum() / (tokens * tokens * k),
        "z": zed * (lse**2).mean(),
    }


def test_losses_and_their_gradients():
    z, a = routed()
    counts = a.load()
    values, dz = moeroute.balance_loss(z, a, switch=0.01, z=0.001)
    expected = losses(z, counts, 2, 0.01, 0.001)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5)
    numeric = np.zeros_like(z, np.float64)
    for i in np.ndindex(z.shape):
        for sign in (1, -1):
            moved = z.astype(np.float64)
            moved[i] += sign * 1e-5
            numeric[i] += sign * sum(losses(moved, counts, 2, 0.01, 0.001).values()) / 2e-5
    np.testing.assert_allclose(dz, numeric, rtol=1e-3, atol=1e-7)


def test_a_bias_follows_the_load():
    controller = moeroute.BiasController(4, step=0.5)
    values = controller.values
    controller.update(np.array([10.0, 0, 5, 5]))
    np.testing.assert_allclose(values, [-0.5, 0.5, 0, 0])
    router = moeroute.Router("E=4 k=1 score=sigmoid bias=selection", bias=values)
    assert router.route(np.zeros((1, 4), np.float32)).ids[0, 0] == 1
    del controller
    assert values[1] == 0.5


def test_choices_of_ones_own():
    a = moeroute.Assignment(np.array([[2, 0], [1, -1]], np.int32), np.array([[0.5, 0.5], [1, 0]], np.float32), 3)
    assert (a.tokens, a.experts, a.k) == (2, 3, 2)
    np.testing.assert_array_equal(moeroute.Plan(a).loads, [1, 1, 1])
