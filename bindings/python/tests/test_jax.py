"""Routing under jit, vmap and grad: the library's bits, and derivatives against finite differences in float64."""

import gc
import threading

import moeroute
import numpy as np
import pytest

jax = pytest.importorskip("jax")

if not hasattr(moeroute._moeroute, "_jax_route"):
    pytest.skip("this build of moeroute has no handler for JAX", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from moeroute import jax as moe  # noqa: E402

rng = np.random.default_rng(5)

ROUTERS = [
    "E=6 k=2 score=softmax normalize=sum",
    "E=6 k=2 score=softmax",
    "E=6 k=3 score=softmax score_domain=selected",
    "E=6 k=3 score=sigmoid normalize=sum eps=1e-20 eps_mode=add scale=2.5",
    "E=6 k=2 score=sqrtsoftplus normalize=sum scale=1.5",
    "E=6 k=2 score=softmax normalize=sum logit_softcap=30",
]


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("spec", ROUTERS)
def test_weights_and_their_gradient(spec, x64):
    router = moeroute.Router(spec)
    z = jnp.asarray(rng.standard_normal((7, 6)))
    check_grads(lambda z: moe.route(router, z)[1], (z,), order=1, modes=["rev"])
    ids, exact = moe.route(router, z)
    again, weights = moe.route(router, z.astype(jnp.float32))
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_allclose(weights, exact, rtol=3e-6)
    d = jnp.asarray(rng.standard_normal(weights.shape))
    (dz,) = jax.vjp(lambda z: moe.route(router, z)[1], z)[1](d)
    (dn,) = jax.vjp(lambda z: moe.route(router, z)[1], z.astype(jnp.float32))[1](d.astype(jnp.float32))
    assert dn.dtype == jnp.float32 and np.abs(dz).max() > 0
    np.testing.assert_allclose(dn, dz, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 100])
def test_the_bits_of_the_library(kind, tokens):
    router = moeroute.Router("mixtral")
    z = jnp.asarray(rng.standard_normal((tokens, 8)), kind)
    expected = router.route(np.asarray(z).view(np.uint16) if kind == jnp.bfloat16 else np.asarray(z))
    for run in (moe.route, jax.jit(moe.route, static_argnums=0)):
        ids, weights = run(router, z)
        assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
        np.testing.assert_array_equal(ids, expected.ids.reshape(tokens, 2))
        np.testing.assert_array_equal(weights, expected.weights.reshape(tokens, 2))


def test_narrow_gradients_keep_their_type():
    router = moeroute.Router("mixtral")
    z = jnp.asarray(rng.standard_normal((5, 8)), jnp.bfloat16)
    dz = jax.jit(jax.grad(lambda z: (moe.route(router, z)[1] ** 2).sum()))(z)
    assert dz.dtype == jnp.bfloat16 and float(jnp.abs(dz).max()) > 0


def test_a_bias_steers_the_choice_and_may_be_written_between_calls():
    bias = np.zeros(256, np.float32)
    router = moeroute.Router("deepseek_v3", bias=bias)
    z = rng.standard_normal((9, 256)).astype(np.float32)
    run = jax.jit(lambda z: moe.route(router, z))
    np.testing.assert_array_equal(run(z)[0], router.route(z).ids)
    bias[:] = rng.standard_normal(256)
    np.testing.assert_array_equal(run(z)[0], router.route(z).ids)


def test_masks_and_token_ids():
    z = rng.standard_normal((6, 8)).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    router = moeroute.Router("mixtral")
    ids, weights = moe.route(router, z, mask=mask)
    expected = router.route(z, mask=mask)
    np.testing.assert_array_equal(ids, expected.ids)
    np.testing.assert_array_equal(weights, expected.weights)
    dz = jax.grad(lambda z: (moe.route(router, z, mask=mask)[1] ** 2).sum())(z)
    assert np.isfinite(dz).all() and not dz[~mask].any() and dz[mask].any(axis=1).all()
    table = rng.permuted(np.tile(np.arange(8, dtype=np.int32), (50, 1)), axis=1)[:, :2].copy()
    hashed = moeroute.Router("E=8 k=2 selection=hash_table score=softmax normalize=sum", table=table)
    tokens = np.array([3, 1, 4, 1, 5, 49], np.int32)
    np.testing.assert_array_equal(moe.route(hashed, z, token_ids=tokens)[0], table[tokens])


@pytest.mark.parametrize("spec", ["E=4 k=2 score=softmax normalize=sum", "E=4 k=2 score=softmax"])
def test_logits_without_a_number_have_no_gradient(spec):
    z = np.array([[1.0, np.nan, 2.0, -np.inf], [0.5, 0.25, 0.0, 1.0]], np.float32)
    router = moeroute.Router(spec)
    dz = jax.grad(lambda z: (moe.route(router, z)[1] ** 2).sum())(z)
    assert np.isfinite(dz).all() and dz[0, 1] == dz[0, 3] == 0 and dz[0, 0] != 0


def test_vmap_is_row_by_row():
    router = moeroute.Router("gpt_oss")
    z = rng.standard_normal((3, 5, 128)).astype(np.float32)
    ids, weights = jax.vmap(lambda z: moe.route(router, z))(z)
    for i in range(3):
        expected = router.route(z[i])
        np.testing.assert_array_equal(ids[i], expected.ids)
        np.testing.assert_array_equal(weights[i], expected.weights)
    many = jax.vmap(jax.grad(lambda z: moe.route(router, z)[1][:, 0].sum()))(z)
    np.testing.assert_array_equal(many[1], jax.grad(lambda z: moe.route(router, z)[1][:, 0].sum())(z[1]))


def test_a_gate_learns_through_the_weights():
    router = moeroute.Router("E=8 k=2 score=softmax normalize=sum")
    x = rng.standard_normal((64, 6)).astype(np.float32)
    values = jnp.asarray(rng.standard_normal(8), jnp.float32)

    @jax.jit
    def loss(gate):
        ids, weights = moe.route(router, x @ gate)
        return (((weights * values[ids]).sum(1) - x[:, 0]) ** 2).mean()

    gate = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)
    first = loss(gate)
    for _ in range(60):
        gate = gate - 0.2 * jax.grad(loss)(gate)
    assert loss(gate) < 0.8 * first


def test_a_router_stays_as_long_as_the_program():
    z = rng.standard_normal((4, 8)).astype(np.float32)
    router = moeroute.Router("mixtral")
    expected = router.route(z).ids
    program = jax.jit(lambda z: moe.route(router, z)[0]).lower(z).compile()
    del router
    gc.collect()
    np.testing.assert_array_equal(program(z), expected)


def test_threads_share_a_program():
    router = moeroute.Router("mixtral")
    z = rng.standard_normal((3000, 8)).astype(np.float32)
    run, wrong = jax.jit(lambda z: moe.route(router, z)[0]), []
    expected = router.route(z).ids

    def check():
        for _ in range(10):
            if not np.array_equal(run(z), expected):
                wrong.append(1)

    threads = [threading.Thread(target=check) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_what_is_refused():
    z = jnp.zeros((3, 8), jnp.float32)
    router = moeroute.Router("mixtral")
    for wrong in (z[0], z[:, :7], z[None]):
        with pytest.raises(ValueError, match=r"logits has shape .*, expected \[T, 8\]"):
            moe.route(router, wrong)
    with pytest.raises(ValueError, match="logits is int32, expected float32"):
        moe.route(router, z.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"mask is bool\[2\], expected bool\[3\]"):
        moe.route(router, z, mask=jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"token_ids is float32\[3\], expected int32\[3\]"):
        moe.route(router, z, token_ids=jnp.ones(3))
    with pytest.raises(ValueError, match="have no derivative here"):
        moe.route(moeroute.Router("E=8 k=2 selection=top_p score=softmax p=0.5"), z)
    with pytest.raises(ValueError, match="is str, expected a Router"):
        moeroute._moeroute._jax_number("mixtral")
    table = np.zeros((5, 1), np.int32)
    hashed = moeroute.Router("E=8 k=1 selection=hash_table score=softmax", table=table)
    with pytest.raises(Exception, match="moeroute::.*token"):
        jax.block_until_ready(moe.route(hashed, z, token_ids=np.array([0, 5, 1], np.int32)))
    with pytest.raises(Exception, match="there is no router 99999 in this process"):
        shape = jax.ShapeDtypeStruct((3, 2), jnp.int32), jax.ShapeDtypeStruct((3, 2), jnp.float32)
        none = jnp.zeros(0, bool), jnp.zeros(0, jnp.int32), jnp.zeros(2, jnp.uint32)
        jax.block_until_ready(jax.ffi.ffi_call("moeroute_route", shape)(z, *none, router=np.int64(99999)))
