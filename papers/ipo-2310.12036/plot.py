"""Final probabilities against tau, and the closed form of IPO's."""

import numpy as np


def plot(figure, lines):
    """Left: the best action of D1. Right: the action that never wins, in the pairs {(a,b), (b,a), (b,c)}."""
    seeds = [line["metrics"] for line in lines if line["run"] == "bandits"]
    if not seeds:
        return
    taus = sorted(float(name.split("_")[-1]) for name in seeds[0] if name.startswith("ipo_read_c_"))
    fine = np.geomspace(taus[0], taus[-1], 200)
    exact = np.exp(np.outer([1, 0, -1], 1 / (3 * fine)))
    curves = {"d1": exact[0] / exact.sum(0), "read_c": 1 / (1 + 2 * np.exp(0.5 / fine))}
    titles = {"d1": "D1: best action", "read_c": "our reading of D3: action c"}
    for axis, what in zip(figure.subplots(1, 2), curves):
        for loss, marker in (("dpo", "s"), ("ipo", "o")):
            values = np.array([[m[f"{loss}_{what}_{tau:g}"] for tau in taus] for m in seeds])
            spread = 1.96 * values.std(0, ddof=min(1, len(seeds) - 1)) / len(seeds) ** 0.5
            axis.errorbar(taus, values.mean(0), spread, fmt=marker, capsize=3, label=loss.upper())
        axis.plot(fine, curves[what], color="C1", label="IPO, closed form")
        axis.axhline(1 / 3, color="grey", linestyle=":", label="reference")
        axis.set(xscale="log", xlabel="tau", title=titles[what], ylim=(-0.05, 1.05))
    figure.axes[0].set_ylabel("probability after 18000 steps")
    figure.axes[1].legend()
