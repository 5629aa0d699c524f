"""Error of the fitted weights against the number of labels."""

import numpy as np


def plot(figure, lines):
    """Means over seeds with 95 % intervals, and the slope -1/2."""
    seeds = [line["metrics"] for line in lines if line["run"] == "estimates"]
    if not seeds:
        return
    axis = figure.subplots()
    sizes = sorted(int(name.split("_")[1]) for name in seeds[0] if name.startswith("robust_") and name[7].isdigit())
    for name, label in (("cdpo", "cDPO"), ("dpo", "DPO"), ("robust", "rDPO")):
        errors = np.array([[m[f"{name}_{size}"] for size in sizes] for m in seeds])
        spread = 1.96 * errors.std(0, ddof=min(1, len(seeds) - 1)) / len(seeds) ** 0.5
        axis.errorbar(sizes, errors.mean(0), spread, marker="o", capsize=3, label=label)
    guide = errors.mean(0)[-1] * (np.array(sizes) / sizes[-1]) ** -0.5
    axis.plot(sizes, guide, color="grey", linestyle=":", label="slope -1/2")
    axis.set(xscale="log", yscale="log", xlabel="labels, 30 % of them flipped", ylabel="error of weights of norm 3")
    axis.legend()
