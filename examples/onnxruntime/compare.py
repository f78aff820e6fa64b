"""Routers as ONNX Runtime's own nodes and as one node: the same experts, and the time of each.

    compare.py libmoeroute_onnxruntime.so [--untimed]

Needs onnxruntime, onnx and numpy. Eight layers' gates and routers in one graph; the time of the same gates
without routers is taken off.
"""

import argparse
import concurrent.futures
import statistics
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LAYERS, WIDTH = 8, 64
ROUTERS = {
    "qwen3_moe": dict(experts=128, k=8, score="Softmax"),
    "deepseek_v3": dict(experts=256, k=8, score="Sigmoid", groups=8, topk_group=4, scale=2.5, biased=True),
}


class Graph:
    """Nodes and constants in the order in which they are asked for."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, value, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op, *inputs, outputs=1, **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names


def by_blocks(g, logits, bias, how):
    """(ids, weights, keys) as exporters write a router."""
    experts, k, groups = how["experts"], how["k"], how.get("groups", 1)
    whole = lambda *values: g.constant(values, np.int64)
    scores = g.node("Softmax", logits, axis=-1) if how["score"] == "Softmax" else g.node("Sigmoid", logits)
    keys = g.node("Add", scores, bias) if bias else scores
    allowed = keys
    if groups > 1:
        grouped = g.node("Reshape", keys, whole(-1, groups, experts // groups))
        best, _ = g.node("TopK", grouped, whole(2), axis=-1, outputs=2)
        worth = g.node("ReduceSum", best, whole(-1), keepdims=0)
        _, chosen = g.node("TopK", worth, whole(how["topk_group"]), axis=-1, outputs=2)
        some = g.node("ScatterElements", g.node("Mul", worth, g.constant(0.0)), chosen,
                      g.node("CastLike", g.node("Add", g.node("Mul", chosen, whole(0)), whole(1)), worth), axis=1)
        inside = g.node("Greater", g.node("Unsqueeze", some, whole(-1)), g.constant(0.5))
        allowed = g.node("Reshape", g.node("Where", inside, grouped, g.constant(-np.inf)), whole(-1, experts))
    _, ids = g.node("TopK", allowed, whole(k), axis=-1, outputs=2)
    weights = g.node("GatherElements", scores, ids, axis=1)
    weights = g.node("Div", weights, g.node("ReduceSum", weights, whole(-1), keepdims=1))
    if "scale" in how:
        weights = g.node("Mul", weights, g.constant(how["scale"]))
    return ids, weights, keys


def session(model, way, library):
    """(session, nodes of one router) for gates alone, or followed by routers of blocks or of one node."""
    how, g, random = ROUTERS[model], Graph(), np.random.default_rng(3)
    outputs = []
    for layer in range(LAYERS):
        gate = g.constant(random.standard_normal((WIDTH, how["experts"])) / 8)
        bias = g.constant(random.standard_normal(how["experts"]) * 0.05) if how.get("biased") else None
        logits = g.node("MatMul", "x", gate)
        before = len(g.nodes)
        if way == "gates":
            outputs.append((logits, TensorProto.FLOAT))
        elif way == "blocks":
            ids, weights, keys = by_blocks(g, logits, bias, how)
            outputs += [(ids, TensorProto.INT64), (weights, TensorProto.FLOAT), (keys, TensorProto.FLOAT)]
        else:
            ids, weights = g.node("Router", *filter(None, [logits, bias]), outputs=2, domain="moeroute", model=model)
            outputs += [(ids, TensorProto.INT32), (weights, TensorProto.FLOAT)]
        nodes = len(g.nodes) - before
    graph = helper.make_graph(
        g.nodes, model, [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", WIDTH])],
        [helper.make_tensor_value_info(name, kind, ["T", None]) for name, kind in outputs], g.constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("moeroute", 1)],
                             ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"]), nodes


def compare(blocks, ours):
    """(ids the same, equal but for rounding, wrong; the largest relative difference of weights)."""
    same = swapped = wrong = 0
    largest = 0.0
    for layer in range(LAYERS):
        ids, weights, keys = blocks[3 * layer:3 * layer + 3]
        got, weight = ours[2 * layer:2 * layer + 2]
        equal = ids == got
        row = np.arange(len(ids))[:, None]
        near = np.abs(keys[row, ids] - keys[row, got]) <= 1e-5 * np.abs(keys[row, ids])
        same += int(equal.sum())
        swapped += int((~equal & near).sum())
        wrong += int((~equal & ~near).sum())
        off = np.abs(weight / weights - 1)[equal]
        wrong += int(np.isnan(off).sum())
        largest = max(largest, float(np.max(off, initial=0.0)))
    return same, swapped, wrong, largest


def times(sessions, x):
    """Medians of seconds a run, the sessions in turns."""
    all_times = [[] for _ in sessions]
    begin = time.perf_counter()
    sessions[1].run(None, {"x": x})
    repeats = max(1, int(0.02 / (time.perf_counter() - begin)))
    for _ in range(9):
        for spent, one in zip(all_times, sessions):
            begin = time.perf_counter()
            for _ in range(repeats):
                one.run(None, {"x": x})
            spent.append((time.perf_counter() - begin) / repeats)
    return [statistics.median(t) for t in all_times]


def refusal(library, model="qwen3_moe", experts=128, bias=None):
    """What is said of a graph with that router on logits of that width, with a bias of that shape ("": left out)."""
    logits = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", experts])
    outputs = [helper.make_tensor_value_info(name, kind, ["T", None])
               for name, kind in (("ids", TensorProto.INT32), ("weights", TensorProto.FLOAT))]
    inputs = ["z"] if bias is None else ["z", "bias" if bias else ""]
    constants = [numpy_helper.from_array(np.zeros(bias, np.float32), "bias")] if bias else []
    node = helper.make_node("Router", inputs, ["ids", "weights"], domain="moeroute", model=model)
    made = helper.make_model(helper.make_graph([node], "one", [logits], outputs, constants),
                             opset_imports=[helper.make_opsetid("moeroute", 1)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    try:
        one = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        one.run(None, {"z": np.zeros((2, experts), np.float32)})
        return "nothing"
    except Exception as error:
        return str(error)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--untimed", action="store_true")
    options = parser.parse_args()
    right = True
    print(f"onnxruntime {onnxruntime.__version__}; ns per token and layer, without the gate")
    for model, how in ROUTERS.items():
        (gates, _), (blocks, many), (ours, one) = [session(model, way, options.library)
                                                   for way in ("gates", "blocks", "node")]
        for tokens in (1, 512):
            x = np.random.default_rng(tokens).standard_normal((tokens, WIDTH)).astype(np.float32)
            same, swapped, wrong, weights = compare(blocks.run(None, {"x": x}), ours.run(None, {"x": x}))
            right = right and wrong == 0 and weights < 1e-5
            each = lambda seconds: "-"
            spent = [0.0] * 3
            if not options.untimed:
                spent = times([gates, blocks, ours], x)
                each = lambda seconds: f"{(seconds - spent[0]) / (tokens * LAYERS) * 1e9:,.0f}"
            print(f"  {model:<12} T = {tokens:<4} {many:3} nodes {each(spent[1]):>8}   {one} node {each(spent[2]):>8}   "
                  f"{same} ids the same, {swapped} equal but for rounding, {wrong} wrong; weights {weights:.0e}")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: ours.run(None, {"x": x}), range(16)))
    if any(not np.array_equal(a, b) for run in runs for a, b in zip(run, runs[0])):
        print("threads that share a session get other results")
        right = False
    deepseek = dict(model="deepseek_v3", experts=256)
    for given, expected in ((dict(), "nothing"), (dict(bias=""), "nothing"), (dict(deepseek, bias=[256]), "nothing"),
                            (dict(model="nobody"), "moeroute::spec_of_model: 'nobody' is not in the catalogue"),
                            (dict(model="grove_moe"), "moeroute::spec_of_model: 'grove_moe' has words"),
                            (dict(experts=100), "logits.cols is 100"), (deepseek, "bias.size() is 0, expected 256"),
                            (dict(deepseek, bias=""), "bias.size() is 0, expected 256"),
                            (dict(deepseek, bias=[255]), "bias.size() is 255, expected 256"),
                            (dict(deepseek, bias=[16, 16]), "the bias is to be [E]")):
        said = refusal(options.library, **given)
        if expected not in said:
            print(f"{given}: expected '{expected}', got '{said}'")
            right = False
    if not right:
        print("NOT THE SAME")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
