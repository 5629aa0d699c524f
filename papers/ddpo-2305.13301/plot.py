"""Mean rewards while learning the ring, and JPEG sizes after each recipe."""

import numpy as np

NAMES = {"sf": "DDPO, score function", "is": "DDPO, importance", "rwr": "RWR", "sparse": "RWR of the top tenth"}
SIZES = ("ddpo_compressible", "rwr_compressible", "before", "rwr_incompressible", "ddpo_incompressible")
TITLES = {"mode": "one of eight modes", "beyond": "outside the data"}


def plot(figure, lines):
    """Mean curves; a dot for each seed."""
    seen = {run: [*{x["seed"]: x["metrics"] for x in lines if x["run"] == run}.values()] for run in ("ring", "jpeg")}
    axes = figure.subplot_mosaic([["mode", "beyond"], ["jpeg", "jpeg"]], height_ratios=[1.4, 1])
    for where, title in TITLES.items():
        for name, label in NAMES.items():
            curves = np.array([m[f"{where}_{name}_course"] for m in seen["ring"]])
            if len(curves):
                axes[where].plot(512 * np.arange(curves.shape[1]) / 1000, curves.mean(0), label=label)
        axes[where].set_xlabel("thousand reward queries")
        axes[where].set_title(f"mean reward: {title}", fontsize=10)
    if seen["ring"]:
        axes["beyond"].legend(fontsize=8)
    for y, name in enumerate(SIZES):
        sizes = [m[name] for m in seen["jpeg"]]
        axes["jpeg"].plot(sizes, [y] * len(sizes), "o", alpha=0.5)
    labels = ["DDPO, smaller", "RWR, smaller", "before", "RWR, larger", "DDPO, larger"]
    axes["jpeg"].set_yticks(range(5), labels, fontsize=8)
    axes["jpeg"].set_xlabel("kB of a JPEG, builtin:shapes")
