"""What does not fit is a ValueError that names the argument and both values."""

import gc
import threading

import moeroute
import numpy as np
import pytest

rng = np.random.default_rng(7)
router = moeroute.Router("mixtral")
logits = rng.standard_normal((6, 8)).astype(np.float32)


def refused(text):
    return pytest.raises(ValueError, match=text)


def test_dtypes():
    for wrong in (logits.astype(np.float64), logits.astype(np.int32), logits.astype(bool)):
        with refused("moeroute::route: logits has elements of .* expected float32, bfloat16 or float16"):
            router.route(wrong)
    with refused("moeroute::route: mask has elements of another kind, expected bool or uint8"):
        router.route(logits, mask=np.ones(6, np.float32))
    with refused("moeroute::Router: bias has elements of another kind, expected float32"):
        moeroute.Router("deepseek_v3", bias=np.zeros(256))


def test_what_is_no_array():
    for wrong in ([[1.0] * 8], "logits", None, 3.0):
        with refused("moeroute::route: logits is .*, expected an array"):
            router.route(wrong)
    with refused("moeroute::route: out is .*ndarray, expected an Assignment"):
        router.route(logits, out=logits)


def test_shapes():
    with refused(r"moeroute::route: logits.cols\S* is 7, expected 8"):
        router.route(logits[:, :7].copy())
    with refused("logits has 1 axes, expected 2"):
        router.route(logits[0])
    with refused("logits has 3 axes, expected 2"):
        router.route(logits[None])
    with refused("mask has 5 values, expected 6"):
        router.route(logits, mask=np.ones(5, bool))
    a = router.route(logits)
    plan = moeroute.Plan(a)
    with refused(r"moeroute::dispatch\w*: x.rows\S* is 5, expected 6"):
        moeroute.dispatch(np.zeros((5, 4), np.float32), plan)
    with refused("moeroute::combine"):
        moeroute.combine(np.zeros((5, 4), np.float32), plan, a)
    with refused(r"moeroute::dispatch\w*: .*expected"):
        moeroute.dispatch(np.zeros((6, 4), np.float32), plan, out=np.zeros((12, 5), np.float32))
    with refused("expected 256"):
        moeroute.Router("deepseek_v3", bias=np.zeros(255, np.float32))


def test_rows_with_gaps():
    with refused("logits has elements 2 apart within a row, expected side by side"):
        router.route(np.zeros((6, 16), np.float32)[:, ::2])
    with refused("logits has elements .* apart within a row"):
        router.route(np.asfortranarray(logits))
    with refused("logits has rows -8 apart, expected at least 8"):
        router.route(logits[::-1])
    with refused("logits has rows 0 apart"):
        router.route(np.broadcast_to(logits[:1], (6, 8)))
    with refused("moeroute::Router: bias has gaps"):
        moeroute.Router("deepseek_v3", bias=np.zeros(512, np.float32)[::2])


def test_read_only_arrays_are_read_and_not_written():
    z = logits.copy()
    z.flags.writeable = False
    a = router.route(z)
    plan = moeroute.Plan(a)
    x = np.zeros((6, 4), np.float32)
    out = np.zeros((12, 4), np.float32)
    out.flags.writeable = False
    with refused("moeroute::dispatch: out is read-only"):
        moeroute.dispatch(x, plan, out=out)


def test_huge_k_and_other_descriptions():
    with refused("k"):
        moeroute.Router("E=8 k=9")
    with refused("k"):
        moeroute.Router("E=8 k=9223372036854775807")
    with refused("experts is 0"):
        moeroute.Router("E=0 k=1")
    with refused("colour"):
        moeroute.Router("E=8 k=2 colour=red")
    with refused("bias"):
        moeroute.Router("deepseek_v3")
    with refused("formula is 'mine', expected one of unlimited, fixed"):
        router.route(logits).apply_capacity(formula="mine")
    with refused("'z80' is no instruction set"):
        moeroute.use_isa("z80")


def test_empty_batches():
    a = router.route(np.zeros((0, 8), np.float32))
    plan = moeroute.Plan(a)
    assert plan.slots == 0
    assert moeroute.combine(moeroute.dispatch(np.zeros((0, 4), np.float32), plan), plan, a).shape == (0, 4)


def test_ids_from_outside_are_checked():
    for wrong in (3, -2):
        with refused("moeroute"):
            moeroute.Assignment(np.array([[wrong]], np.int32), np.ones((1, 1), np.float32), 3)
    with refused("weights has 1 values, expected 2"):
        moeroute.Assignment(np.zeros((1, 2), np.int32), np.ones(1, np.float32), 3)


def test_results_outlive_what_they_came_from():
    a = moeroute.Router("mixtral").route(logits.copy())
    ids = a.ids
    del a
    gc.collect()
    np.testing.assert_array_equal(ids, router.route(logits).ids)
    bias = np.zeros(256, np.float32)
    biased = moeroute.Router("deepseek_v3", bias=bias)
    del bias
    gc.collect()
    np.zeros(256, np.float32).fill(3)
    biased.route(np.zeros((2, 256), np.float32))


def test_threads_share_a_router():
    z = rng.standard_normal((2000, 8)).astype(np.float32)
    expected, wrong = router.route(z).ids, []

    def run():
        for _ in range(20):
            if not np.array_equal(router.route(z).ids, expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_threads_that_write_one_assignment_take_turns():
    out = router.route(logits)
    sizes = [rng.standard_normal((n, 8)).astype(np.float32) for n in (1, 300, 2000, 40)]

    def run(z):
        for _ in range(50):
            router.route(z, out=out)
            out.load()
            assert out.ids.shape[1] == 2

    threads = [threading.Thread(target=run, args=(z,)) for z in sizes]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert out.tokens in (1, 300, 2000, 40)
