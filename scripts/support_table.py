"""Write the README's table of what works where, from what the tests ran: `make support`.

docs/support.json has the CPU's and the executor's part, which a run of all tests holds to account
(tests/support.py); bench/results/gpu-*.json have what the tests of `make test-gpu` ran on a GPU.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CLAIMS = ROOT / "docs" / "support.json"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- make support -->\n", "<!-- end -->"
PLACES = {"cpu": "C", "executor": "E", "gpu": "G"}
OPS = ("attention", "attention_varlen", "decode", "append_kv", "merge_states", "flat_linear")
# Rows in this order; what is in none of them follows, so a new feature needs no edit here.
FIRST = ("", "float64", "float32", "bfloat16", "float16", "GQA", "head_dim_v")
MASKS = ("causal", "causal top-left", "window", "kv_start", "seqlens_kv", "bool mask")
MASKS += ("additive mask", "mask gradient", "softcap", "sink", "lse gradient")


def read():
    """{(op, direction, feature): letters of the places where a passing test met it}"""
    found = json.loads(CLAIMS.read_text())
    trees = [{place: found[place] for place in ("cpu", "executor")}]
    for path in sorted(RESULTS.glob("gpu-*.json")):
        for stage in json.loads(path.read_text())["stages"]:
            trees.append({"gpu": stage["details"].get("support", {}).get("gpu", {})})
    cells = {}
    for tree in trees:
        for place, ops in tree.items():
            for op, directions in ops.items():
                for direction, features in directions.items():
                    for feature in features:
                        cells.setdefault((op, direction, feature), set()).add(place)
    return {
        key: " ".join(letter for place, letter in PLACES.items() if place in places)
        for key, places in cells.items()
    }


def render(cells):
    """The table in Markdown."""
    columns = sorted({key[:2] for key in cells}, key=lambda c: (OPS.index(c[0]), c[1] != "forward"))
    order = FIRST + MASKS
    rows = sorted(
        {key[2] for key in cells},
        key=lambda row: (order.index(row) if row in order else len(order), row),
    )
    heads = ["", *(f"`{op}`{' backward' * (way == 'backward')}" for op, way in columns)]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        name = f"`{row}`" if "_" in row else row or "any call"
        lines.append([name, *(cells.get((*column, row), "") for column in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    text = README.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:begin]}{render(read())}{text[end:]}")


if __name__ == "__main__":
    main()
