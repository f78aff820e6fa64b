#!/usr/bin/env python3
"""Says which cases of the conformance kit an engine fails, and which known mistake that looks like.

    moeroute_conformance.py [--unordered] [--ids-only] CASES.jsonl < ANSWERS
    moeroute_conformance.py [--unordered] [--ids-only] CASES.jsonl --ids I.npy --weights W.npy

ANSWERS has a line {"ids": [k], "weights": [k]} for each token of the cases, in their order; I.npy and
W.npy hold the same as arrays [T, k]. --unordered: ranks may stand in any order. --ids-only: weights are
not looked at. Exit code: 0 where all agree, 1 where some differ, 2 where a file is malformed.

Needs nothing but Python's standard library. From a program of yours:

    kit = read_kit("cases/mixtral.jsonl")
    answers = [(ids, weights) for logits in every token of kit["cases"]]
    judgement = judge(kit, answers)
"""

import ast
import json
import math
import struct
import sys


class Malformed(ValueError):
    """What is wrong with a file: `FILE:LINE: field: sentence`."""


def _float32(x):
    """The nearest float32."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


class _Line:
    """One line of a file of lines of JSON, whose fields are read by name."""

    def __init__(self, file, number, text):
        self.file, self.line = file, number
        try:
            self.value = json.loads(text, parse_constant=lambda word: self.refuse("the line", f"{word} is no JSON"))
        except json.JSONDecodeError as e:
            self.refuse(f"column {e.colno}", "this is no JSON")
        if not isinstance(self.value, dict):
            self.refuse("the line", "is no JSON object")

    def refuse(self, field, what):
        raise Malformed(f"{self.file}:{self.line}: {field}: {what}")

    def at(self, field):
        if field not in self.value:
            self.refuse(field, "is missing")
        return self.value[field]

    def text(self, field):
        value = self.at(field)
        if not isinstance(value, str):
            self.refuse(field, "is no text")
        return value

    def whole(self, field, value):
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(field, f"is {json.dumps(value)[:40]}, expected a whole number")
        return value

    def within(self, field, least, most):
        n = self.whole(field, self.at(field))
        if not least <= n <= most:
            self.refuse(field, f"is {n}, expected {least} to {most}")
        return n

    def number(self, field, value):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _float32(value)
        if value in ("nan", "inf", "-inf"):
            return float(value)
        self.refuse(field, f'is {json.dumps(value)[:40]}, expected a number, "nan", "inf" or "-inf"')

    def list(self, field, value, size, read):
        if not isinstance(value, list):
            self.refuse(field, "is no list")
        if len(value) != size:
            self.refuse(field, f"has {len(value)} values, expected {size}")
        return [read(f"{field}[{i}]", x) for i, x in enumerate(value)]

    def floats(self, field, value, size):
        return self.list(field, value, size, self.number)

    def wholes(self, field, value, size):
        return self.list(field, value, size, self.whole)

    def answers(self, front, of, tokens, k):
        for field in ("ids", "weights"):
            if not isinstance(of, dict) or field not in of:
                self.refuse(front + field, "is missing")
        ids = self.list(front + "ids", of["ids"], tokens, lambda f, x: self.wholes(f, x, k))
        weights = self.list(front + "weights", of["weights"], tokens, lambda f, x: self.floats(f, x, k))
        return list(zip(ids, weights))


def _size(value):
    return len(value) if isinstance(value, list) else 0


def read_kit(path):
    """A file of the kit as a dict: model, k, cases ... Raises Malformed."""
    kit = {"cases": []}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            r = _Line(path, number, text)
            if number == 1:
                if r.text("format") != "moeroute-conformance":
                    r.refuse("format", f"is '{r.text('format')}', expected 'moeroute-conformance'")
                r.within("version", 1, 1)
                kit["model"], kit["rule"] = r.text("model"), r.text("rule")
                kit["experts"] = r.within("experts", 1, 1 << 20)
                kit["columns"] = r.within("columns", 1, 1 << 21)
                kit["k"] = r.within("k", 1, kit["experts"])
                for field in ("relative", "absolute"):
                    kit[field] = r.number(field, r.at(field))
                for field in ("bias", "per_expert_scale"):
                    kit[field] = r.floats(field, r.value[field], kit["experts"]) if field in r.value else []
                table = r.value.get("table", [])
                kit["table"] = r.list("table", table, _size(table), lambda f, x: r.wholes(f, x, kit["k"]))
                if not isinstance(r.at("mistakes"), dict):
                    r.refuse("mistakes", "is no JSON object")
                for name, sentence in r.value["mistakes"].items():
                    if not isinstance(sentence, str):
                        r.refuse("mistakes." + name, "is no text")
                kit["mistakes"] = r.value["mistakes"]
                continue
            case = {"name": r.text("case"), "reason": r.text("reason"), "mistaken": {}}
            logits = r.at("logits")
            tokens = _size(logits)
            case["logits"] = r.list("logits", logits, tokens, lambda f, x: r.floats(f, x, kit["columns"]))
            for field in ("mask", "token_ids"):
                case[field] = r.wholes(field, r.value[field], tokens) if field in r.value else []
            for id in case["token_ids"]:
                if not 0 <= id < len(kit["table"]):
                    r.refuse("token_ids", f"{id} is no row of the table")
            case["answers"] = r.answers("", {"ids": r.at("ids"), "weights": r.at("weights")}, tokens, kit["k"])
            for ids, _ in case["answers"]:
                for id in ids:
                    if not -1 <= id < kit["experts"]:
                        r.refuse("ids", f"{id} is no expert of {kit['experts']}")
            if not isinstance(r.at("mistakes"), dict):
                r.refuse("mistakes", "is no JSON object")
            for name, of in r.value["mistakes"].items():
                front = f"mistakes.{name}."
                if name not in kit["mistakes"]:
                    r.refuse("mistakes", f"'{name}' is not in the first line")
                if not isinstance(of, dict) or "tokens" not in of:
                    r.refuse(front + "tokens", "is missing")
                at = r.wholes(front + "tokens", of["tokens"], _size(of["tokens"]))
                answers = r.answers(front, of, len(at), kit["k"])
                for token in at:
                    if not 0 <= token < tokens:
                        r.refuse(front + "tokens", f"{token} is no token of the case")
                case["mistaken"][name] = dict(zip(at, answers))
            kit["cases"].append(case)
    if "model" not in kit:
        raise Malformed(f"{path}:1: format: is missing")
    return kit


def tokens_of(kit):
    return sum(len(case["logits"]) for case in kit["cases"])


def read_answers(lines, name, kit):
    """(ids, weights) for each token of the kit. Raises Malformed."""
    out, tokens = [], tokens_of(kit)
    for text in lines:
        r = _Line(name, len(out) + 1, text)
        if len(out) == tokens:
            r.refuse("the line", f"is one too many, {kit['model']} has {tokens} tokens")
        out.append((r.wholes("ids", r.at("ids"), kit["k"]), r.floats("weights", r.at("weights"), kit["k"])))
    if len(out) < tokens:
        raise Malformed(f"{name}:{len(out) + 1}: ids: is missing, {kit['model']} has {tokens} tokens")
    return out


def read_npy(path):
    """(shape, flat list) of a .npy file with row-major little-endian integers or floats."""

    def refuse(field, what):
        raise Malformed(f"{path}:1: {field}: {what}")

    with open(path, "rb") as file:
        data = file.read()
    if len(data) < 10 or data[:6] != b"\x93NUMPY":
        refuse("magic", "this is no .npy file")
    front = 12 if data[6] >= 2 else 10
    size = int.from_bytes(data[8:front], "little")
    if len(data) < front + size:
        refuse("header", "is cut off")
    try:
        header = ast.literal_eval(data[front : front + size].decode("latin1").strip())
        type, shape, fortran = header["descr"], header["shape"], header["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError):
        refuse("header", "is no description of an array")
    if fortran:
        refuse("fortran_order", "expected False")
    codes = {"f4": "f", "f8": "d", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q"}
    if not isinstance(type, str) or type[:1] not in "<|" or type[1:] not in codes:
        refuse("descr", f"is '{type}', expected little-endian integers or floats")
    count = math.prod(shape)
    if len(data) - front - size != count * int(type[2]):
        refuse("shape", "does not fit the file's size")
    return tuple(shape), list(struct.unpack(f"<{count}{codes[type[1:]]}", data[front + size :]))


def read_arrays(ids_path, weights_path, kit):
    """The answers of two arrays [T, k]. Raises Malformed."""
    k, want, flat = kit["k"], (tokens_of(kit), kit["k"]), []
    for path in (ids_path, weights_path):
        shape, values = read_npy(path)
        if shape != want:
            got = ", ".join(map(str, shape))
            raise Malformed(f"{path}:1: shape: is ({got}), expected ({want[0]}, {want[1]})")
        flat.append(values)
    return [([int(i) for i in flat[0][t * k : t * k + k]], flat[1][t * k : t * k + k]) for t in range(want[0])]


def difference(kit, got, expected, unordered=False, ids_only=False):
    """Where an answer differs; "" where it does not. NaN equals NaN alone."""
    if unordered:
        got, expected = (tuple(zip(*sorted(zip(*a), key=lambda pair: pair[0]))) for a in (got, expected))
    for rank, (g, e) in enumerate(zip(got[0], expected[0])):
        if g != e:
            return f"rank {rank}: expert {g}, expected {e}"
    for rank, (g, e) in enumerate(zip(got[1], expected[1])):
        if ids_only:
            break
        if e != e:
            same = g != g
        elif math.isinf(e) or math.isinf(g):
            same = g == e
        else:
            same = abs(g - e) <= kit["relative"] * abs(e) + kit["absolute"]
        if not same:
            return f"rank {rank}: weight {g:.9g}, expected {e:.9g}"
    return ""


def judge(kit, answers, unordered=False, ids_only=False):
    """What was found: {"tokens", "wrongs": [(case, token, what)], "suspects": [(name, explains, contradicts)],
    "recognised": [name]}, the likeliest first."""
    counts = {name: [0, 0] for name in kit["mistakes"]}
    wrongs, n = [], 0
    for c, case in enumerate(kit["cases"]):
        for t, right in enumerate(case["answers"]):
            got, n = answers[n], n + 1
            what = difference(kit, got, right, unordered, ids_only)
            if what:
                wrongs.append((c, t, what))
            for name, tokens in case["mistaken"].items():
                # In this comparison the mistake may not show.
                if t not in tokens or not difference(kit, tokens[t], right, unordered, ids_only):
                    continue
                is_it = not difference(kit, got, tokens[t], unordered, ids_only)
                counts[name][0 if is_it else 1] += 1
    suspects = [(name, *counts[name]) for name in sorted(counts) if counts[name][0] > 0]
    suspects.sort(key=lambda s: (-s[1], s[2]))
    recognised = [name for name, explains, against in suspects if against == 0 and explains == len(wrongs)]
    return {"tokens": n, "wrongs": wrongs, "suspects": suspects, "recognised": recognised}


def report(kit, found):
    """Prints what was found; the exit code."""
    print(f"{kit['model']}: {len(found['wrongs'])} of {found['tokens']} tokens differ")
    for c, case in enumerate(kit["cases"]):
        of_case = [w for w in found["wrongs"] if w[0] == c]
        if of_case:
            print(f"  {case['name']}: {len(of_case)} of {len(case['answers'])}: token {of_case[0][1]}: {of_case[0][2]}")
            print(f"    ({case['reason']})")
    if not found["wrongs"]:
        return 0
    for name in found["recognised"]:
        print(f"  looks like {name}: {kit['mistakes'][name]}")
    if not found["recognised"]:
        for name, explains, against in found["suspects"][:3]:
            print(f"  in part like {name}: {kit['mistakes'][name]} ({explains} tokens are, {against} are not)")
        if not found["suspects"]:
            print("  looks like no mistake that the kit knows")
    return 1


def main(words):
    options = {"unordered": False, "ids_only": False}
    arrays, names, words = {}, [], list(words)
    while words:
        word = words.pop(0)
        if word in ("--unordered", "--ids-only"):
            options[word[2:].replace("-", "_")] = True
        elif word in ("--ids", "--weights") and words:
            arrays[word] = words.pop(0)
        elif word == "--help":
            print(__doc__.strip())
            return 0
        else:
            names.append(word)
    if len(names) != 1 or names[0].startswith("--") or len(arrays) == 1:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        kit = read_kit(names[0])
        if arrays:
            answers = read_arrays(arrays["--ids"], arrays["--weights"], kit)
        else:
            answers = read_answers(sys.stdin, "standard input", kit)
        return report(kit, judge(kit, answers, **options))
    except (Malformed, OSError) as e:
        print(f"moeroute-conformance: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
