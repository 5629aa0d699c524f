"""Mean rewards with samples of the policy and of the reference, and where offline DPO puts its probability."""

import numpy as np

NAMES = {"bon": "best-of-n", "ipo": "IPO", "dpo": "DPO"}
LABELS = NAMES | {"dpo_clear": "DPO, clear pairs"}


def plot(figure, lines):
    """Bars with standard errors for the network; arms for the table and the network."""
    seen = {
        run: [*{x["seed"]: x["metrics"] for x in lines if x["run"] == run}.values()] for run in ("network", "table")
    }
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    for i, who in enumerate(("off", "on")):
        keys = [f"{where}_{who}_{name}" for where in ("far", "near") for name in NAMES]
        values = np.array([[m[key] for key in keys] for m in seen["network"]])
        place = np.arange(6) + (i - 0.5) * 0.4 + np.repeat([0, 0.5], 3)
        error = values.std(0) / len(values) ** 0.5
        left.bar(place, values.mean(0), 0.4, yerr=error, label={"off": "the reference's", "on": "its own"}[who])
    left.set_xticks(np.arange(6) + np.repeat([0, 0.5], 3), [*NAMES.values()] * 2, fontsize=8, rotation=30)
    left.set_ylim(0, 1.3)
    left.set_title("mean reward; peak at 70 | at 20", fontsize=10)
    left.legend(title="samples", fontsize=8, title_fontsize=8, loc="upper left", ncols=2)
    for run, metrics in seen.items():
        for name, style in (("bon", ":"), ("dpo", "-"), ("dpo_clear", "--")):
            if f"far_off_{name}_probs" not in metrics[0]:
                continue
            probs = np.mean([m[f"far_off_{name}_probs"] for m in metrics], 0)
            right.plot(probs, style, c={"network": "C2", "table": "C3"}[run], lw=1, label=f"{LABELS[name]}, {run}")
    right.axvline(70, color="k", ls="--", lw=0.5)
    right.set_yscale("log")
    right.set_ylim(1e-5, 2)
    right.set_title("offline, peak at 70: $\\pi$(arm)", fontsize=10)
    right.legend(fontsize=7)
