"""The steps with gradients: checked against finite differences in float64, and the kernels against torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import moeroute  # noqa: E402
from moeroute import torch as moe  # noqa: E402

ROUTERS = [
    "E=6 k=2 score=softmax normalize=sum",
    "E=6 k=2 score=softmax",
    "E=6 k=3 score=softmax score_domain=selected",
    "E=6 k=3 score=sigmoid normalize=sum eps=1e-20 eps_mode=add scale=2.5",
    "E=6 k=2 score=sqrtsoftplus normalize=sum scale=1.5",
    "E=6 k=2 score=softmax normalize=sum logit_softcap=30",
]


def numbers(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("spec", ROUTERS)
def test_weights_and_their_gradient(spec):
    router = moeroute.Router(spec)
    z = numbers(7, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: moe.route(router, z)[1], (z,))
    # The library's weights are those of the formula.
    ids, exact = moe.route(router, z)
    narrow = z.detach().float().requires_grad_()
    again, weights = moe.route(router, narrow)
    assert torch.equal(ids, again)
    np.testing.assert_allclose(weights.detach().numpy(), exact.detach().numpy(), rtol=3e-6)
    d = numbers(*weights.shape, seed=2)
    (dz,) = torch.autograd.grad(exact, z, d)
    (dn,) = torch.autograd.grad(weights, narrow, d.float())
    np.testing.assert_allclose(dn.numpy(), dz.numpy(), rtol=1e-4, atol=1e-6)


def test_rows_to_experts_and_back():
    router = moeroute.Router("E=6 k=2 score=softmax normalize=sum")
    z, x = numbers(7, 6), numbers(7, 5, seed=2)
    ids, weights = moe.route(router, z)
    plan = moeroute.Plan(moeroute.Assignment(ids.numpy(), weights.float().numpy(), 6), block=4)
    assert torch.autograd.gradcheck(lambda x: moe.dispatch(x, plan), (x.clone().requires_grad_(),))
    rows = moe.dispatch(x, plan)
    assert torch.autograd.gradcheck(
        lambda rows, w: moe.combine(rows, w, plan, ids),
        (rows.clone().requires_grad_(), weights.clone().requires_grad_()),
    )
    for dtype, room in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        narrow = moe.dispatch(x.to(dtype), plan)
        assert narrow.dtype == dtype and torch.equal(narrow, rows.to(dtype))
        y = moe.combine(narrow, weights.float(), plan, ids)
        assert torch.allclose(y.double(), moe.combine(rows, weights, plan, ids), atol=room, rtol=room)


def test_a_whole_layer_with_modules():
    router = moeroute.Router("E=4 k=2 score=sigmoid normalize=sum eps=1e-20 eps_mode=add")
    experts = [torch.nn.Linear(5, 5).double() for _ in range(4)]
    x, z = numbers(6, 5), numbers(6, 4, seed=3)

    def run(x, z):
        return moe.layer(router, z, x, experts)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), z.requires_grad_()))
    run(x, z).sum().backward()
    used = set(moe.route(router, z)[0].ravel().tolist())
    assert {e for e in range(4) if experts[e].weight.grad is not None} == used


def test_losses_reach_the_logits():
    z = numbers(9, 6, dtype=torch.float32).requires_grad_()
    ids, weights = moe.route(moeroute.Router("E=6 k=2 score=softmax"), z)
    loss = moe.balance_loss(z, ids, weights, switch=0.5, z=0.1)
    (dz,) = torch.autograd.grad(loss, z)
    wide = z.detach().double().requires_grad_()
    counts = torch.bincount(ids.ravel(), minlength=6)
    p = torch.softmax(wide, 1)
    expected = 0.5 * 6 * (p.sum(0) * counts).sum() / (81 * 2) + 0.1 * (torch.logsumexp(wide, 1) ** 2).mean()
    (dwide,) = torch.autograd.grad(expected, wide)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(dz.numpy(), dwide.numpy(), rtol=1e-4, atol=1e-7)


def test_tensors_go_in_without_a_copy_in_every_type():
    router = moeroute.Router("E=6 k=2 score=softmax normalize=sum")
    z = numbers(5, 6, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = z.to(dtype)
        np.testing.assert_array_equal(router.route(narrow).ids, router.route(narrow.float()).ids)
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        router.route(z.double())


def test_what_has_no_derivative_is_refused():
    with pytest.raises(ValueError, match="no derivative here"):
        moe.route(moeroute.Router("phimoe"), numbers(2, 16, dtype=torch.float32))


def test_a_layer_names_the_experts_that_it_lacks():
    router = moeroute.Router("E=6 k=2 score=softmax normalize=sum")
    z, x = numbers(5, 6, dtype=torch.float32), numbers(5, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="moeroute.torch.layer: experts has 5 entries, expected 6"):
        moe.layer(router, z, x, [torch.nn.Identity()] * 5)


def test_a_layer_learns():
    torch.manual_seed(0)
    router = moeroute.Router("E=4 k=2 score=softmax normalize=sum")
    gate = torch.nn.Linear(8, 4, bias=False)
    experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
    x = torch.randn(128, 8)
    target = torch.where(x[:, :1] > 0, x.flip(1), -x)
    optimiser = torch.optim.Adam([*gate.parameters(), *experts.parameters()], lr=0.02)
    history = []
    for _ in range(60):
        loss = (moe.layer(router, gate(x), x, experts) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert history[-1] < 0.4 * history[0]
