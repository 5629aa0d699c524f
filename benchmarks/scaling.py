"""Time and memory of a DPO and a GRPO step against length, vocabulary, size of the group and share of the prompt."""

from typing import Any

from benchmarks import report
from benchmarks.run import Options, measure
from benchmarks.workloads import Shape, Workload, changed

SHARE_OF = 512
SWEEPS: dict[str, tuple[tuple[str, ...], dict[float, dict[str, int]]]] = {
    # what is varied: of which methods, and the shape at each value
    "tokens of a row": (("dpo", "grpo"), {2 * n: {"prompt": n, "completion": n} for n in (32, 64, 128, 256)}),
    "vocabulary": (("dpo", "grpo"), {n: {"vocab": n} for n in (32_000, 64_000, 128_000, 256_000)}),
    "answers of a group": (("grpo",), {n: {"batch": n, "group": n} for n in (2, 4, 8, 16)}),
    f"prompt's share of {SHARE_OF} tokens": (
        ("dpo", "grpo"),
        {x: {"prompt": int(x * SHARE_OF), "completion": int((1 - x) * SHARE_OF)} for x in (0.125, 0.375, 0.625, 0.875)},
    ),
}
BASE = {"dpo": Shape(prompt=64, completion=64, vocab=8000, batch=4), "grpo": Shape(completion=32, vocab=8000, batch=8)}
COPIES = 2 * (4 + 1)
"""Of the embedding and the head: the policy's weights, gradients and two moments, and the reference's weights."""
COLUMNS = {
    "sweep": "varied", "at_value": "value", "method": "method", "side": "side", "step_s": "step s",
    "tokens_per_s": "tokens/s", "peak_mb": "peak MB", "peak_less_vocab_mb": "less vocabulary's weights",
    "time_ratio": "time x", "memory_ratio": "memory x",
}  # fmt: skip


def scaling(options: Options, given: dict[str, Any], only: tuple[str, ...] = ()) -> None:
    """Measure all sweeps (or those of which a word is in `only`); `given` replaces fields of the shape not varied."""
    records = []
    for sweep, (methods, values) in SWEEPS.items():
        if only and not any(word in sweep for word in only):
            continue
        for value, fields in values.items():
            for method in methods:
                workload = changed(Workload(method, BASE[method]), **given | fields)
                for record in measure(f"{method}, {sweep} {value:g}", options, workload):
                    shape = workload.shape
                    held = COPIES * shape.vocab * shape.hidden * 4 / 2**20
                    extra = {"sweep": sweep, "at_value": value, "method": method}
                    records.append(record | extra | {"peak_less_vocab_mb": record["peak_mb"] - held})
                    print(f"{method} {sweep} {value:g} {record['side']}: {record['step_s']:.3g} s", flush=True)
    if not records:
        raise ValueError(f"only={only} is in none of {', '.join(SWEEPS)}")
    report.write("scaling", records, columns=COLUMNS, note=report.conditions(records))
    report.curves("scaling", records)
