"""Routers against the formulas written out in NumPy, in float64."""

import json
import pathlib

import moeroute
import numpy as np
import pytest

rng = np.random.default_rng(3)


def softmax(z):
    p = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def best(values, k):
    """The k best of every row, the lower id first among equals."""
    return np.argsort(-values, axis=-1, kind="stable")[:, :k]


def bfloat16(x):
    """The bits of the nearest bfloat16, and the floats that they are."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("tokens", [0, 1, 7, 100])
def test_softmax_over_all_divided_by_the_sum(tokens):
    z = rng.standard_normal((tokens, 8)).astype(np.float32)
    ids, weights = moeroute.Router("mixtral").route(z)
    assert ids.shape == weights.shape == (tokens, 2)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    if tokens:
        expected = best(z, 2)
        w = np.take_along_axis(softmax(z), expected, 1)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(weights, w / w.sum(1, keepdims=True), rtol=3e-6)


def test_softmax_over_the_selected():
    z = rng.standard_normal((33, 128)).astype(np.float32)
    ids, weights = moeroute.Router("gpt_oss").route(z)
    expected = best(z, 4)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(weights, softmax(np.take_along_axis(z, expected, 1)), rtol=3e-6)


def test_sigmoid_with_bias_and_groups():
    z = rng.standard_normal((50, 256)).astype(np.float32)
    bias = (0.1 * rng.standard_normal(256)).astype(np.float32)
    ids, weights = moeroute.Router("deepseek_v3", bias=bias).route(z)
    score = 1 / (1 + np.exp(-z.astype(np.float64)))
    choice = score + bias
    groups = np.sort(choice.reshape(50, 8, 32), axis=2)[:, :, -2:].sum(2)
    keep = np.zeros((50, 8), bool)
    np.put_along_axis(keep, best(groups, 4), True, 1)
    expected = best(np.where(np.repeat(keep, 32, axis=1), choice, -np.inf), 8)
    w = np.take_along_axis(score, expected, 1)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(weights, 2.5 * w / (w.sum(1, keepdims=True) + 1e-20), rtol=3e-6)


def test_bias_may_be_written_between_calls():
    z = np.zeros((1, 64), np.float32)
    bias = np.zeros(64, np.float32)
    router = moeroute.Router("exaone_moe", bias=bias)
    assert router.route(z).ids[0, 0] == 0
    bias[40] = 1
    assert router.route(z).ids[0, 0] == 40


def test_a_router_in_words():
    router = moeroute.Router("E=6 k=3 score=sigmoid normalize=none")
    assert (router.experts, router.k, router.columns, router.ragged) == (6, 3, 6, False)
    z = rng.standard_normal((5, 6)).astype(np.float32)
    ids, weights = router.route(z)
    np.testing.assert_array_equal(ids, best(z, 3))
    np.testing.assert_allclose(weights, np.take_along_axis(1 / (1 + np.exp(-z)), ids, 1), rtol=1e-5)
    assert moeroute.describe(router.spec) == router.spec


def test_a_router_of_a_config():
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64,
              "num_hidden_layers": 2}
    try:
        router = moeroute.Router(config)
    except ValueError as e:
        if "reads no configs" in str(e):
            pytest.skip(str(e))
        raise
    assert router.spec == moeroute.Router("mixtral").spec


def test_every_model_of_the_catalogue_has_a_line():
    names = moeroute.models()
    assert len(names) > 80 and len(set(names)) == len(names)
    for name in names:
        assert moeroute.describe(moeroute.describe(name)) == moeroute.describe(name)


def test_nan_and_minus_infinity_are_not_chosen():
    z = np.full((1, 8), -np.inf, np.float32)
    z[0, 3] = np.nan
    z[0, 5] = 0
    ids, weights = moeroute.Router("mixtral").route(z)
    np.testing.assert_array_equal(ids, [[5, -1]])
    np.testing.assert_array_equal(weights, [[1, 0]])


def test_masked_tokens_have_no_expert():
    z = rng.standard_normal((3, 8)).astype(np.float32)
    ids, weights = moeroute.Router("mixtral").route(z, mask=np.array([True, False, True]))
    np.testing.assert_array_equal(ids[1], [-1, -1])
    np.testing.assert_array_equal(weights[1], [0, 0])
    np.testing.assert_array_equal(ids[::2], best(z, 2)[::2])


def test_sixteen_bit_logits_count_as_the_floats_that_they_are():
    z = rng.standard_normal((40, 64)).astype(np.float32)
    router = moeroute.Router("olmoe")
    bits, widened = bfloat16(z)
    for narrow, wide in ((bits, widened), (z.astype(np.float16), z.astype(np.float16).astype(np.float32))):
        a, b = router.route(narrow), router.route(wide)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.weights, b.weights)


def test_rows_may_have_a_stride():
    z = rng.standard_normal((9, 20)).astype(np.float32)
    router = moeroute.Router("mixtral")
    for view in (z[:, 4:12], z[::2, :8], z[3:4, :8]):
        np.testing.assert_array_equal(router.route(view).ids, router.route(view.copy()).ids)


def test_tables_choose_by_token_id():
    table = np.array([[5, 1], [0, 7]], np.int32)
    router = moeroute.Router("E=8 k=2 score=uniform selection=hash_table", table=table)
    ids, _ = router.route(np.zeros((3, 8), np.float32), token_ids=np.array([1, 0, 1], np.int32))
    np.testing.assert_array_equal(ids, table[[1, 0, 1]])


def test_a_varying_number_of_choices_comes_as_lists():
    z = rng.standard_normal((6, 8)).astype(np.float32)
    a = moeroute.Router("E=8 k=8 selection=top_p p=0.6").route(z)
    p = -np.sort(-softmax(z), axis=1)
    counts = (np.cumsum(p, axis=1) < np.float32(0.6)).sum(1) + 1
    np.testing.assert_array_equal(np.diff(a.offsets), counts)
    assert a.ids.shape == a.weights.shape == (counts.sum(),)


def test_rules_over_the_batch_come_from_a_line():
    z = rng.standard_normal((12, 4)).astype(np.float32)
    a = moeroute.Router("E=4 score=softmax selection=expert_choice take=3").route(z)
    chosen = np.argsort(-softmax(z), axis=0, kind="stable")[:3]  # of each expert, its three best tokens
    expected = [sorted(e for e in range(4) if t in chosen[:, e]) for t in range(12)]
    assert [sorted(a.ids[i:j]) for i, j in zip(a.offsets, a.offsets[1:])] == expected
    ids, weights = moeroute.Router("E=4 k=1 score=softmax selection=sinkhorn").route(z)
    assert ids.shape == weights.shape == (12, 1) and (ids >= 0).all()
    # A word that the compiled library has no field for is refused, not left out.
    with pytest.raises(ValueError, match="has words that the compiled library does not have"):
        moeroute.Router("E=4 k=1 score=softmax selection=sinkhorn plan_eps=0.5")


def test_every_instruction_set_gives_the_same_bits():
    z = rng.standard_normal((64, 60)).astype(np.float32)
    results = []
    for name in moeroute.isas():
        moeroute.use_isa(name)
        assert moeroute.isa() == name
        results.append(moeroute.Router("qwen2_moe").route(z))
    moeroute.use_isa(moeroute.isas()[0])
    for r in results[1:]:
        np.testing.assert_array_equal(r.ids, results[0].ids)
        np.testing.assert_array_equal(r.weights.view(np.uint32), results[0].weights.view(np.uint32))


def test_an_assignment_can_be_written_again():
    router, out = moeroute.Router("mixtral"), moeroute.Assignment(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 1)
    before = out.ids
    for tokens in (50, 3, 0, 200):
        z = rng.standard_normal((tokens, 8)).astype(np.float32)
        assert router.route(z, out=out) is out
        np.testing.assert_array_equal(out.ids, router.route(z).ids)
    np.testing.assert_array_equal(before, [[0]])


def test_the_version_is_that_of_the_header():
    root = pathlib.Path(__file__).resolve().parents[3]
    header = root / "include/moeroute/base/version.hpp"
    if not header.exists():
        pytest.skip("no checkout around")
    numbers = [line.split()[-1] for line in header.read_text().splitlines() if "define" in line]
    assert moeroute.__version__ == ".".join(numbers)


def test_the_package_has_stubs():
    folder = pathlib.Path(moeroute.__file__).parent
    if not (folder / "_moeroute.pyi").exists():
        pytest.skip("not installed by CMake")
    text = (folder / "_moeroute.pyi").read_text()
    assert "class Router" in text and "def route" in text
    assert (folder / "py.typed").exists()


def test_json_configs_and_names_are_not_confused():
    with pytest.raises(ValueError, match="'no_such_model' is not in the catalogue"):
        moeroute.Router("no_such_model")
    with pytest.raises(ValueError, match="the router is list, expected"):
        moeroute.Router(json.loads("[1]"))
