"""Verifiers that stand on other packages, each behind an extra."""

from typing import Any

from alignkit.hf.calls import alarms_work

SECONDS = 5  # for math-verify to parse an answer, and to compare it


def mathematics(text: str, **columns: Any) -> float | None:
    """`builtin:math`: 1 if math-verify finds the text's answer equal to that of the column "answer" or "solution".

    The column "answer" is an expression, as it is, in dollars or boxed, or what stands behind "####"; a solution is
    searched for one. None where the column is; 0 for an answer that takes math-verify too long.
    """
    from math_verify import parse, verify

    golds = {name: columns[name] for name in ("answer", "solution") if name in columns}
    if not golds:
        raise ValueError(f"the dataset has no column 'answer' or 'solution', only {sorted(columns)}")
    name = next((name for name in golds if golds[name] is not None), None)
    if name is None:
        return None
    gold = str(golds[name]).rpartition("####")[2].strip()
    if name == "answer":
        gold = f"\\boxed{{{gold}}}"
    seconds = SECONDS if alarms_work() else None
    expected = parse(gold, parsing_timeout=seconds)
    if not expected:
        raise ValueError(f"the column {name!r} holds no mathematics: {golds[name]!r:.200}")
    return float(verify(expected, parse(text, parsing_timeout=seconds), timeout_seconds=seconds))
