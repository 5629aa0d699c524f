"""Asymptotic errors against K, and simulated ones against N."""

from statistics import fmean, stdev


def plot(figure, lines):
    """Ratio of the traces; N times the squared error with the traces."""
    exact = next((line["metrics"] for line in reversed(lines) if line["run"] == "asymptotics"), None)
    simulated = [line["metrics"] for line in lines if line["run"] == "simulation"]
    left, right = figure.subplots(1, 2)
    if exact:
        left.plot(range(2, 6), exact["ratios"], "o-")
        left.set_xticks(range(2, 6))
        left.set(xlabel="answers in a ranking, K", title="error of pairs / likelihood")
    ns = [500, 2000, 8000]
    for name, label, colour in (("pairs", "all pairs", "C1"), ("kwise", "likelihood", "C0")):
        if len(simulated) > 1:
            seen = [[m[f"{name}_{n}"] for m in simulated] for n in ns]
            errors = [stdev(x) / len(x) ** 0.5 for x in seen]
            right.errorbar(ns, [fmean(x) for x in seen], errors, fmt="o", capsize=3, color=colour, label=label)
            right.legend(loc="center right")
        if exact:
            right.axhline(exact[f"trace_{name}_4"], color=colour, linestyle=":")
    right.set(xscale="log", xlabel="N", title="N x squared error, K = 4")
    right.set_xticks(ns, [str(n) for n in ns])
    right.minorticks_off()
