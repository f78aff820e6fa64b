"""Caches of experts and placements against what they are by definition, in plain Python and NumPy."""

import threading
from collections import OrderedDict

import moeroute
import numpy as np
import pytest

rng = np.random.default_rng(21)
policies = ["lru", "lfu", "fifo", "segmented", "least_stale", "cost_aware", "segment", "belady"]


def refused(text):
    return pytest.raises(ValueError, match=text)


def trace(tokens, experts, k):
    """Choices that come again, as those of a model do."""
    score = rng.gumbel(size=(tokens, experts)) + 2.0 * rng.standard_normal(experts)
    return np.argsort(-score, axis=1)[:, :k].astype(np.int32)


def lru(steps, capacity):
    """(hits, loads, evictions) of every step: all are looked up before anything is loaded."""
    held, out = OrderedDict(), []
    for step in steps:
        hits = [e for e in step if e in held]
        loads = [e for e in step if e not in held]
        evictions = [e for e in held if e not in step][: max(0, len(held) + len(loads) - capacity)]
        for e in evictions:
            del held[e]
        for e in step:
            held[e] = None
            held.move_to_end(e)
        out.append((len(hits), loads, evictions))
    return out


# ---- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [3, 5, 11, 16])
def test_lru_is_the_longest_unused(capacity):
    ids = trace(300, 16, 3)
    cache = moeroute.ExpertCache(1, 16, capacity)
    total = 0
    for step, (hits, loads, evictions) in zip(ids, lru(ids.tolist(), capacity)):
        found = cache.step(step)
        assert found[0] == hits
        assert found[1].tolist() == loads and found[1].dtype == np.int32
        assert found[2].tolist() == evictions
        assert cache.resident()[step].all() and cache.resident().sum() == cache.held <= capacity
        total += hits
    figures = moeroute.simulate_cache(ids, 16, capacity)
    assert (figures["lookups"], figures["hits"], figures["misses"]) == (900, total, 900 - total)
    assert figures["hit_rate"] == total / 900
    assert figures["evictions"] == 900 - total - cache.held
    np.testing.assert_array_equal(cache.uses(), np.bincount(ids.ravel(), minlength=16)[None])


def test_lru_over_layers_is_one_cache_of_keys():
    ids = trace(200, 8, 2)
    cache = moeroute.ExpertCache(layers=3, experts=8, capacity=10)
    steps = [(layer * 8 + row).tolist() for row in ids for layer in range(3)]
    expected = iter(lru(steps, 10))
    for row in ids:
        for layer in range(3):
            hits, loads, evictions = cache.step(row, layer=layer)
            assert (hits, loads.tolist(), evictions.tolist()) == next(expected)
    assert cache.uses().shape == (3, 8) and cache.uses().sum() == 200 * 3 * 2
    assert (cache.layers, cache.experts, cache.capacity, cache.policy) == (3, 8, 10, "lru")


def test_fifo_forgets_what_came_first_even_if_used():
    cache = moeroute.ExpertCache(1, 4, 2, policy="fifo")
    for e, leaves in [(0, []), (1, []), (0, []), (2, [0]), (1, []), (0, [1])]:
        assert cache.step(np.array([e], np.int32))[2].tolist() == leaves


def test_lfu_forgets_the_least_used():
    cache = moeroute.ExpertCache(1, 4, 2, policy="lfu")
    for e, leaves in [(0, []), (0, []), (1, []), (2, [1]), (2, []), (2, []), (3, [0])]:
        assert cache.step(np.array([e], np.int32))[2].tolist() == leaves


def test_belady_is_the_bound_of_all():
    ids = trace(400, 24, 2)
    hits = {p: moeroute.simulate_cache(ids, 24, 6, policy=p)["hits"] for p in policies}
    assert all(hits["belady"] >= h for h in hits.values()) and hits["belady"] > hits["lru"]
    # By definition, with one expert a token: the one whose next use is farthest leaves.
    one = trace(200, 9, 1)[:, 0].tolist()
    held, expected = set(), 0
    for t, e in enumerate(one):
        expected += e in held
        if e not in held and len(held) == 4:
            held.remove(max(held, key=lambda h: one.index(h, t) if h in one[t:] else 1000))
        held.add(e)
    found = moeroute.simulate_cache(np.array(one, np.int32)[:, None], 9, 4, policy="belady")
    assert found["hits"] == expected


def test_belady_step_by_step_is_the_simulation():
    ids = trace(100, 12, 2)
    never = np.iinfo(np.int64).max
    cache, hits = moeroute.ExpertCache(1, 12, 4, policy="belady"), 0
    for t, row in enumerate(ids):
        later = [np.flatnonzero((ids[t + 1 :] == e).any(1)) for e in row]
        after = [t + 1 + n[0] if len(n) else never for n in later]
        hits += cache.step(row, next=np.array(after, np.int64))[0]
    assert hits == moeroute.simulate_cache(ids, 12, 4, policy="belady")["hits"]


def test_pins_stay_and_no_choice_is_skipped():
    cache = moeroute.ExpertCache(1, 6, 3, pinned=np.array([5], np.int32))
    assert cache.would_hit(5) and not cache.would_hit(0) and cache.held == 1
    for e in (0, 1, 2, 3, 4):
        assert 5 not in cache.step(np.array([e, -1], np.int32))[2]
    assert cache.step(np.array([5, -1], np.int32))[0] == 1
    padded = np.array([[0, -1], [-1, -1], [0, 1]], np.int32)
    figures = moeroute.simulate_cache(padded, 6, 2)
    assert (figures["lookups"], figures["hits"]) == (3, 1)
    assert moeroute.simulate_cache(padded, 6, 2, cold="free")["hits"] == 3


def test_bytes_and_prefetch():
    sizes = np.array([[4, 1, 1, 2]], np.int64)
    cache = moeroute.ExpertCache(1, 4, 4, bytes=sizes)
    for e in (1, 2, 3):
        cache.step(np.array([e], np.int32))
    assert cache.held == 4
    assert cache.step(np.array([0], np.int32))[2].tolist() == [1, 2, 3] and cache.held == 4
    ahead = moeroute.ExpertCache(1, 8, 3)
    ahead.step(np.array([0], np.int32))
    hits, loads, evictions = ahead.prefetch(np.array([0, 1, 2, 3], np.int32), 0, most=2)
    assert (hits, loads.tolist(), evictions.tolist()) == (1, [1, 2], [])


def test_what_caches_refuse():
    ids = np.zeros((2, 1), np.int32)
    for wrong in ({"capacity": 0}, {"capacity": 9}, {"experts": 0}, {"layers": 0}):
        name = next(iter(wrong))
        with refused(f"moeroute::expert_cache: {name} is {wrong[name]}, expected "):
            moeroute.ExpertCache(**{"layers": 1, "experts": 8, "capacity": 4, **wrong})
    with refused("policy is 'mru', expected one of lru, lfu, fifo, segmented"):
        moeroute.ExpertCache(1, 8, 4, policy="mru")
    for decay in (0.0, 1.5, float("nan")):
        with refused("decay is .*, expected above 0, at most 1"):
            moeroute.ExpertCache(1, 8, 4, decay=decay)
    with refused("pinned is 8, expected 0 to 7"):
        moeroute.ExpertCache(1, 8, 4, pinned=np.array([8], np.int32))
    with refused("the size of what is pinned is 5, expected at most 4"):
        moeroute.ExpertCache(1, 8, 4, pinned=np.arange(5, dtype=np.int32))
    with refused("pinned has elements of another kind, expected int32"):
        moeroute.ExpertCache(1, 8, 4, pinned=np.arange(3.0))
    with refused("bytes is 0, expected above 0"):
        moeroute.ExpertCache(1, 2, 4, bytes=np.array([0, 4]))
    with refused("expected 2"):
        moeroute.ExpertCache(1, 2, 4, bytes=np.array([4, 4, 4]))
    cache = moeroute.ExpertCache(1, 8, 4)
    for wrong in (8, -2, 2**31 - 1, -(2**31)):
        with refused(f"expert is {wrong}, expected 0 to 7"):
            cache.step(np.array([0, wrong], np.int32))
        with refused(f"expert is {wrong}, expected 0 to 7"):
            moeroute.simulate_cache(np.array([[0], [wrong]], np.int32), 8, 4, policy="belady")
    assert cache.held == 0, "a step is taken as a whole or not at all"
    with refused("layer is 1, expected 0 to 0"):
        cache.step(ids, layer=1)
    with refused("layer is -1, expected 0 to 0"):
        cache.resident(-1)
    with refused("ids has elements of another kind, expected int32"):
        cache.step(ids.astype(np.int64))
    with refused("ids is list, expected an array"):
        cache.step([0, 1])
    with refused("next is given, expected under belady alone"):
        cache.step(ids[0], next=np.array([3]))
    with refused("next.size\\(\\) is 0, expected 1"):
        moeroute.ExpertCache(1, 8, 4, policy="belady").step(ids[0])
    with refused("ids has 1 axes, expected 2"):
        moeroute.simulate_cache(ids[0], 8, 4)
    with refused("capacity is 1, expected 2 to 8"):
        moeroute.simulate_cache(np.array([[0, 1]], np.int32), 8, 1)
    with refused("window is 0"):
        moeroute.simulate_cache(ids, 8, 4, policy="segment", window=0)
    with refused("cold is 'warm', expected one of counted, free"):
        moeroute.simulate_cache(ids, 8, 4, cold="warm")


def test_empty_traces():
    for shape in ((0, 2), (3, 0), (0, 0)):
        for policy in policies:
            figures = moeroute.simulate_cache(np.zeros(shape, np.int32), 4, 2, policy=policy)
            assert figures["lookups"] == figures["misses"] == 0 and figures["hit_rate"] == 0
    hits, loads, evictions = moeroute.ExpertCache(1, 4, 2).step(np.zeros(0, np.int32))
    assert (hits, len(loads), len(evictions)) == (0, 0, 0)


# ---- placements ------------------------------------------------------------------------------------

# The example of EPLB's README: two layers of 12 experts, 16 slots, 4 groups, 2 nodes, 8 ranks.
published = [
    (
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    ),
    (
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ),
]


def rank_loads(p, loads):
    """By definition: equal parts of an expert's load for each of its slots."""
    of = p.expert_of_slot
    part = np.asarray(loads, np.float64) / np.maximum(np.bincount(of, minlength=p.experts), 1)
    return np.bincount(p.rank_of_slot, weights=part[of], minlength=p.ranks)


@pytest.mark.parametrize("loads, slots", published)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, np.float64])
def test_eplb_gives_the_published_example(loads, slots, kind):
    p = moeroute.eplb(np.array(loads, kind), ranks=8, slots=16, nodes=2, groups=4)
    assert p.expert_of_slot.tolist() == slots
    assert p.slot_offset.tolist() == list(range(0, 17, 2))
    assert p.rank_of_slot.tolist() == [s // 2 for s in range(16)]
    assert p.node_of_rank.tolist() == [0] * 4 + [1] * 4
    assert (p.experts, p.ranks, p.nodes, p.slots) == (12, 8, 2, 16)
    phy2log, log2phy, logcnt = p.eplb_arrays()
    assert phy2log.tolist() == slots
    assert logcnt.tolist() == np.bincount(slots).tolist() == p.replicas.tolist()
    for e in range(12):
        assert sorted(s for s in log2phy[e] if s >= 0) == [s for s in range(16) if slots[s] == e]


def test_imbalance_is_max_over_mean():
    for _ in range(20):
        loads = rng.gamma(0.5, size=16)
        for p in (
            moeroute.Placement.contiguous(16, 4),
            moeroute.Placement.round_robin(16, 4),
            moeroute.eplb(loads, 4, 20),
            moeroute.search_placement(loads, 4, 20),
        ):
            sums = rank_loads(p, loads)
            np.testing.assert_allclose(p.rank_loads(loads), sums, rtol=1e-12)
            np.testing.assert_allclose(p.imbalance(loads), sums.max() / sums.mean(), rtol=1e-12)
    assert moeroute.Placement.contiguous(4, 2).imbalance(np.zeros(4)) == 1.0
    assert moeroute.Placement.contiguous(4, 2).imbalance(np.array([1, 2, 3, 4])) == 1.4


def test_contiguous_and_round_robin():
    p = moeroute.Placement.contiguous(10, 4)
    assert p.rank_of_slot.tolist() == [e * 4 // 10 for e in range(10)]
    assert p.expert_of_slot.tolist() == list(range(10)) and p.share.tolist() == [1.0] * 10
    q = moeroute.Placement.round_robin(10, 4)
    assert [q.experts_of_rank(r).tolist() for r in range(4)] == [list(range(r, 10, 4)) for r in range(4)]


def test_search_is_no_worse_than_eplb_and_above_the_bound():
    for _ in range(10):
        loads = rng.gamma(0.4, size=32)
        p, e = moeroute.search_placement(loads, 8, 40), moeroute.eplb(loads, 8, 40)
        assert not len(p.duplicates()) and not len(p.lost()) and (p.replicas >= 1).all()
        assert len(e.duplicates()) or p.imbalance(loads) <= e.imbalance(loads)
        assert p.rank_loads(loads).max() >= moeroute.placement_bound(loads, 8, 40) * (1 - 1e-12)
        assert p == moeroute.search_placement(loads, 8, 40)


def test_replan_follows_the_load_within_its_budget():
    loads = rng.gamma(0.5, size=32)
    old = moeroute.search_placement(loads, 8, 40)
    now = loads * rng.uniform(0.3, 3.0, 32)
    for budget in (0, 2, 8):
        new, moves = moeroute.replan(old, now, budget=budget)
        assert moves <= budget and moeroute.count_moves(old, new) <= moves
        assert new.imbalance(now) <= old.imbalance(now)
        rows = moeroute.transfers(old, new)
        assert rows.shape == (moeroute.count_moves(old, new), 4)
        for expert, source, target, slot in rows.tolist():
            assert expert in old.experts_of_rank(source) and expert not in old.experts_of_rank(target)
            assert new.expert_of_slot[slot] == expert and new.rank_of_slot[slot] == target
    assert new != old and new.imbalance(now) < old.imbalance(now)
    assert moeroute.replan(old, now, budget=0)[0] == old


def test_relabel_undoes_a_renaming_of_ranks():
    old = moeroute.Placement.contiguous(12, 4)
    slots = old.expert_of_slot.reshape(4, 3)[[2, 0, 3, 1]].ravel()
    made = moeroute.Placement(12, slots, ranks=4)
    assert moeroute.count_moves(old, made) == 12
    assert moeroute.relabel(old, made) == old


def test_a_rank_that_dies():
    p = moeroute.Placement(4, np.array([0, 1, 2, 3, 0, 2], np.int32), ranks=3)
    assert p.replicas.tolist() == [2, 1, 2, 1] and p.slots_of_expert(2).tolist() == [2, 5]
    q = p.without(np.array([True, True, False]))
    assert q.replicas.tolist() == [1, 1, 1, 1] and q.alive.tolist() == [True, True, False]
    assert q.expert_of_slot.tolist() == [0, 1, 2, 3, -1, -1] and q.lost().tolist() == []
    assert p.without(np.array([True, False, True])).lost().tolist() == [3]
    with refused("no rank is alive"):
        p.without(np.zeros(3, bool))


def test_unequal_ranks_and_shares():
    p = moeroute.Placement(
        3,
        np.array([0, 1, 2, 0], np.int32),
        slot_offset=np.array([0, 1, 4], np.int32),
        share=np.array([0.25, 1, 1, 0.75]),
    )
    np.testing.assert_allclose(p.rank_loads(np.array([8.0, 1, 2])), [2, 9])
    assert hash(p) == hash(moeroute.Placement(3, p.expert_of_slot, slot_offset=p.slot_offset, share=p.share))
    assert p != 3 and p is not None and p != None  # noqa: E711


def check_batch(plan, counts, ranks):
    """Pieces cut every expert's tokens; weights go where a piece is foreign; loads are sums of pieces."""
    own, load = len(counts) // ranks, np.zeros(ranks, np.int64)
    foreign = set()
    for e, n in enumerate(counts):
        rows = plan.pieces[plan.pieces[:, 0] == e]
        assert rows[:, 3].tolist() == [*rows[1:, 2], n][: len(rows)] and (n == 0 or rows[0, 2] == 0)
        for _, r, begin, end in rows.tolist():
            load[r] += end - begin
            if r != e // own:
                foreign.add((e, e // own, r))
    assert load.tolist() == plan.load.tolist() and load.sum() == sum(counts)
    assert {tuple(m) for m in plan.moves.tolist()} == foreign
    assert plan.imbalance == pytest.approx(load.max() / load.mean())
    placed = plan.placement()
    assert placed.slots == len(counts) + len(foreign) and placed.ranks == ranks


def test_plans_of_one_batch():
    for _ in range(20):
        counts = rng.geometric(0.02, 16).astype(np.int64) * (rng.random(16) < 0.7)
        counts[0] += 1
        spilled, exact = moeroute.spill(counts, 4), moeroute.balance_exactly(counts, 4)
        for plan in (spilled, exact):
            assert plan.enabled
            check_batch(plan, counts.tolist(), 4)
        assert spilled.load.max() <= spilled.cap + 3
        assert exact.load.max() - exact.load.min() <= 1
        rest = moeroute.spill(counts, 4, min_imbalance=100.0)
        assert not rest.enabled and rest.load.tolist() == counts.reshape(4, 4).sum(1).tolist()
        assert moeroute.spill(counts, 4, alpha=(4, 1)).load.tolist() == rest.load.tolist()


def test_loads_that_are_none():
    planners = {
        "eplb": lambda v: moeroute.eplb(v, 2, 4),
        "search_placement": lambda v: moeroute.search_placement(v, 2, 4),
        "replan": lambda v: moeroute.replan(moeroute.Placement.contiguous(4, 2), v),
        "rank_loads": lambda v: moeroute.Placement.contiguous(4, 2).imbalance(v),
        "placement_bound": lambda v: moeroute.placement_bound(v, 2, 4),
    }
    for name, plan in planners.items():
        for wrong in (np.nan, np.inf, -1.0):
            with refused(f"moeroute::{name}: the load of expert 2 is .*, expected a finite number >= 0"):
                plan(np.array([1, 1, wrong, 1]))
        with refused(f"moeroute::{name}: loads has 2 axes, expected 1"):
            plan(np.ones((2, 2)))
        for kind in (np.float16, np.int8, bool, np.complex128):
            with refused(f"moeroute::{name}: loads has elements of another kind, expected float64"):
                plan(np.ones(4, kind))
        with refused(f"moeroute::{name}: loads is list, expected an array"):
            plan([1.0] * 4)
        with refused(f"moeroute::{name}"):
            plan(np.ones(0))
    gaps = np.ones(8)
    gaps[1::2] = np.nan
    assert moeroute.eplb(gaps[::2], 2, 4) == moeroute.eplb(np.ones(4), 2, 4), "strides are fine: it is a copy"
    assert moeroute.eplb(np.arange(4.0)[::-1], 2, 6) == moeroute.eplb(np.array([3.0, 2, 1, 0]), 2, 6)


def test_sizes_that_do_not_fit():
    loads = np.ones(8)
    for planner in (moeroute.eplb, moeroute.search_placement, moeroute.placement_bound):
        with refused("slots is 7, expected 8 to"):
            planner(loads, 7, 7)
        with refused("9 slots on 2 ranks, expected a multiple of the ranks"):
            planner(loads, 2, 9)
        for ranks in (0, -1, 2**40):
            with refused(f"ranks is {ranks}, expected 1 to"):
                planner(loads, ranks, 8)
    with refused("4 ranks on 3 nodes, expected a multiple of the nodes"):
        moeroute.eplb(loads, 4, 8, nodes=3)
    with refused("8 experts in 3 groups"):
        moeroute.eplb(loads, 4, 8, groups=3)
    with refused("load.size\\(\\) is 8, expected 4"):
        moeroute.Placement.contiguous(4, 2).imbalance(loads)
    with refused("target is 0.5"):
        moeroute.replan(moeroute.Placement.contiguous(8, 2), loads, target=0.5)
    with refused("budget is -1"):
        moeroute.replan(moeroute.Placement.contiguous(8, 2), loads, budget=-1)
    with refused("node_of_rank.size\\(\\) is 3, expected 2"):
        moeroute.search_placement(loads, 2, 8, node_of_rank=np.zeros(3, np.int32))
    with refused("expected"):
        moeroute.count_moves(moeroute.Placement.contiguous(8, 2), moeroute.Placement.contiguous(8, 4))
    for planner in (moeroute.spill, moeroute.balance_exactly):
        with refused("8 experts on 3 ranks"):
            planner(np.ones(8, np.int64), 3)
        with refused("count is -1"):
            planner(np.array([1, -1]), 2)
        with refused("counts has elements of another kind, expected int64 or int32"):
            planner(np.ones(8), 2)
        with refused("lambda is nan"):
            planner(np.array([1, 1]), 2, min_imbalance=float("nan"))
        with refused("min_rows is 0"):
            planner(np.array([1, 1]), 2, min_rows=0)
        with refused("experts is 0"):
            planner(np.ones(0, np.int64), 2)
    with refused("alpha_num is 1, expected 2 to"):
        moeroute.spill(np.array([1, 1]), 2, alpha=(1, 2))


def test_placements_that_are_none():
    slots = np.array([0, 1, 2, 3], np.int32)
    with refused("expected either ranks or slot_offset"):
        moeroute.Placement(4, slots)
    with refused("expected either ranks or slot_offset"):
        moeroute.Placement(4, slots, ranks=2, slot_offset=np.array([0, 4], np.int32))
    with refused("4 slots on 3 ranks"):
        moeroute.Placement(4, slots, ranks=3)
    with refused("the expert of slot 3 is 3, expected -1 to 2"):
        moeroute.Placement(3, slots, ranks=2)
    with refused("slot_offset falls behind rank 1"):
        moeroute.Placement(4, slots, slot_offset=np.array([0, 3, 1, 4], np.int32))
    with refused("slot_offset\\[R\\] is 3, expected 4"):
        moeroute.Placement(4, slots, slot_offset=np.array([0, 3], np.int32))
    with refused("slot_offset is empty"):
        moeroute.Placement(4, slots, slot_offset=np.zeros(0, np.int32))
    with refused("expert_of_slot has elements of another kind, expected int32"):
        moeroute.Placement(4, slots.astype(np.int64), ranks=2)
    with refused("the shares of expert 0 sum to 0.5"):
        moeroute.Placement(4, slots, ranks=2, share=np.array([0.5, 1, 1, 1]))
    with refused("share is nan"):
        moeroute.Placement(4, slots, ranks=2, share=np.array([np.nan, 1, 1, 1]))
    with refused("node 0 has no rank"):
        moeroute.Placement(4, slots, ranks=2, node_of_rank=np.array([1, 1], np.int32))
    p = moeroute.Placement.contiguous(4, 2)
    for wrong in (-1, 4):
        with refused(f"expert is {wrong}, expected 0 to 3"):
            p.slots_of_expert(wrong)
    with refused("rank is 2, expected 0 to 1"):
        p.experts_of_rank(2)


def test_arrays_of_a_placement_are_copies():
    p = moeroute.Placement.contiguous(4, 2)
    p.expert_of_slot[:] = 7
    assert p.expert_of_slot.tolist() == [0, 1, 2, 3]


def test_planners_run_beside_one_another():
    loads = rng.gamma(0.4, size=64)
    expected, wrong = moeroute.search_placement(loads, 8, 80), []

    def run():
        for _ in range(3):
            if moeroute.search_placement(loads, 8, 80) != expected:
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
