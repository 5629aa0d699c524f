"""Tables, JSON lines and plots of what was measured, in `benchmarks/results/`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RATIOS = "time: side / alignkit, memory: alignkit / side"
COLUMNS = {
    "workload": "workload", "side": "side", "step_s": "step s", "range": "min to max", "tokens_per_s": "tokens/s",
    "peak_mb": "peak MB", "import_s": "import s", "first_step_s": "first step s", "time_ratio": "time x",
    "memory_ratio": "memory x", "loss": "first loss", "grad_norm": "first norm",
}  # fmt: skip
Records = Sequence[dict[str, Any]]


def table(records: Records, columns: dict[str, str] = COLUMNS) -> str:
    """A markdown table, padded so that it reads as text too."""
    rows = [list(columns.values())]
    for record in records:
        shown = record | {"range": f"{record['step_min_s']:.3g} to {record['step_max_s']:.3g}"}
        rows.append([_shown(shown.get(name, "")) for name in columns])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(x.ljust(n) for x, n in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (n + 2) for n in widths) + "|", *lines[1:]])


def _shown(x: Any) -> str:
    if not isinstance(x, float):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def write(name: str, records: Records, *, columns: dict[str, str] = COLUMNS, note: str = "") -> None:
    """`name`.jsonl, which grows, and `name`.md of this run; the table is printed too."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    text = table(records, columns)
    (RESULTS / f"{name}.md").write_text(f"{note}\n\n{text}\n")
    print(f"\n{note}\n\n{text}\n\nwritten to {RESULTS}/{name}.jsonl and .md", flush=True)


def conditions(records: Records) -> str:
    """Where and how it was measured."""
    r = records[0]
    versions = sorted({f"{x['side']} {x['version']}" for x in records if x["side"] not in ("bare", "best", "loop")})
    precision = "bf16" if r["bf16"] else "fp32"
    return (
        f"{r['device']}, {r['threads']} threads, {precision}, torch {r['torch']}, transformers {r['transformers']}, "
        f"{', '.join(versions)}; medians of {r['repeats']} runs of {r['steps']} steps after the first ({RATIOS}); "
        f"tokens/s: sampled tokens of grpo and rloo, else all but padding; {r['at']}, load average "
        f"{max(x['load'] for x in records):.1f} of {os.cpu_count()} cores (above the threads: others ran too)"
    )


def bars(name: str, records: Records) -> None:
    """Step time and peak memory of every side relative to alignkit's."""
    plt = _pyplot()
    names, sides = list(dict.fromkeys(r["workload"] for r in records)), list(dict.fromkeys(r["side"] for r in records))
    figure, axes = plt.subplots(2, 1, figsize=(2 + 1.2 * len(names), 7), sharex=True, layout="constrained")
    values = {(r["workload"], r["side"]): (r["time_ratio"], 1 / r["memory_ratio"]) for r in records}
    width = 0.8 / len(sides)
    for axis, k, title in zip(axes, (0, 1), ("step time / alignkit's", "peak memory / alignkit's")):
        for i, side in enumerate(sides):
            places = [(j, values[n, side][k]) for j, n in enumerate(names) if (n, side) in values]
            axis.bar(
                [j + (i - len(sides) / 2 + 0.5) * width for j, _ in places], [y for _, y in places], width, label=side
            )
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_ylabel(title)
    axes[0].legend(ncols=len(sides))
    axes[1].set_xticks(range(len(names)), names, rotation=30, ha="right")
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def curves(name: str, records: Records) -> None:
    """Time and memory against what was varied: one column for each, a line for each method and side."""
    plt = _pyplot()
    sweeps = list(dict.fromkeys(r["sweep"] for r in records))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 7), squeeze=False, layout="constrained")
    keys = dict.fromkeys((r["method"], r["side"]) for r in records)
    for j, sweep in enumerate(sweeps):
        for i, key in enumerate(keys):
            points = [r for r in records if (r["method"], r["side"]) == key and r["sweep"] == sweep]
            style = {"marker": "o", "label": " ".join(key), "color": f"C{i}"}
            style["linestyle"] = "-" if key[1] == "alignkit" else "--"
            axes[0, j].plot([r["at_value"] for r in points], [r["step_s"] for r in points], **style)
            axes[1, j].plot([r["at_value"] for r in points], [r["peak_mb"] for r in points], **style)
            less = [r["peak_less_vocab_mb"] for r in points]
            axes[1, j].plot([r["at_value"] for r in points], less, color=f"C{i}", linestyle=":")
        axes[1, j].set_xlabel(sweep)
        for axis in axes[:, j]:
            axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("s per step")
    axes[1, 0].set_ylabel("peak MB (dotted: less vocabulary's weights)")
    axes[0, 0].legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
