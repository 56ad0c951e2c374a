"""What a GPU run prints last: what is red, then a line a case, in at most 10,000 characters."""

import json
from typing import Any

LIMIT = 10_000


def summary(run: Any) -> str:
    """``run`` is a :class:`benchmarks.gpu.Run` that has ended."""
    environment, bench = run.bench["environment"], run.bench
    packages = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "triton", "transformers", "peft")
    )
    head = [
        f"part {run.part}: {environment['device']}, driver {environment['driver'] or 'none'}; {packages}; "
        f"commit {environment['commit']}; {environment['date']}",
        f"reached: copy {bench['copy_bytes_per_s'] / 1e12:.3g} TB/s, "
        f"product {bench['flops_per_s'] / 1e12:.3g} TFLOP/s; "
        f"clocks: {environment['clocks'] or 'none'}",
    ]
    if run.tests is None:
        head.append("tests: NOT RUN here, nor in this folder for this commit: part 1 runs them")
    else:
        head += _cut([f"RED {name}" for name in run.tests.red], 1800)
        head.append(run.tests.words())
    head += _cut([f"RED {problem}" for problem in run.problems], 2400)
    head += _cut(run.notes, 800)
    found = _rows(run)
    lines = [line(rows) for rows in _by_case(found)]
    tail = "dry run: nothing here is a measurement" if run.dry else f"rows, logs, stacks: {run.out}"
    used = sum(len(text) + 1 for text in head) + len(tail) + 1
    return "\n".join([*head, *_cut(lines, LIMIT - used), tail])[:LIMIT]


def _rows(run: Any) -> list[dict[str, Any]]:
    """The rows of this run."""
    path = run.out / "gpu.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["date"] == run.bench["environment"]["date"]]


def _by_case(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    cases: dict[tuple, list] = {}
    for row in rows:
        cases.setdefault((row["entry"], row["shape"], row["dtype"]), []).append(row)
    return list(cases.values())


def line(rows: list[dict[str, Any]]) -> str:
    """A case: ours against floor and best peer, then every variant's time (from Python), error, share of the floor."""
    first = rows[0]
    red = first["extra"].get("red_tests")
    verdict = f" | {red:.0f} RED TESTS, nothing is claimed" if red else _verdict(rows)
    text = f"{first['entry']} | {first['shape']}, {first['dtype']}{verdict} | {first['unit']}: "
    return text + "; ".join(_variant(row) for row in rows)


def _variant(row: dict[str, Any]) -> str:
    extra, details = row["extra"], []
    if "eager_us" in extra:
        details.append(f"py {_number(extra['eager_us'])}")
    if not extra.get("graphed", 1):
        details.append("no graph")
    if "error" in extra:
        details.append(f"err {extra['error']:.1e}")
    if row["variant"].startswith("fastadapter") and "percent_of_floor" in extra:
        details.append(f"{extra['percent_of_floor']:.0f} % of floor")
    if row["variant"].startswith("fastadapter") and row["backend"] not in ("triton", ""):
        details.append(row["backend"])
    return f"{row['variant']} {_number(row['median'])}" + (f" ({', '.join(details)})" if details else "")


def _verdict(rows: list[dict[str, Any]]) -> str:
    """Ratios of cost: ours against the floor, and against the best of the peers that do the same work."""
    ours = [row for row in rows if row["variant"].startswith("fastadapter")][:1]
    if not ours:
        return " | OURS IS MISSING"
    mine, text = ours[0], ""
    if mine["variant"] != mine["floor"]:
        text = f" | {mine['ratio']:.2f} x {mine['floor']}"
    peers = [
        row for row in rows
        if not row["variant"].startswith(("fastadapter", "(", "copy")) and row["variant"] != row["floor"]
    ]  # fmt: skip
    if peers:
        best = min(peers, key=lambda row: row["ratio"])
        ratio = mine["ratio"] / best["ratio"]
        text += f" | {ratio:.2f} x {best['variant']}" + (" LOSES" if ratio > 1.02 else "")
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cut(lines: list[str], limit: int) -> list[str]:
    """As many whole lines as fit, and how many are missing."""
    kept, used = [], 0
    for index, text in enumerate(lines):
        text = text if len(text) <= 800 else text[:800] + " ..."
        if used + len(text) + 60 > limit:
            return [*kept, f"... and {len(lines) - index} more, in the files"]
        kept.append(text)
        used += len(text) + 1
    return kept
