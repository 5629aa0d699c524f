"""Gold score of best-of-n against sqrt(KL): errors with light and heavy tails, and trained proxies."""

from math import log, sqrt
from statistics import fmean


def plot(figure, lines):
    """Means over seeds."""
    left, right = figure.subplots(1, 2, sharey=True)
    ns = [4**i for i in range(8)]
    d = [sqrt(log(n) - (n - 1) / n) for n in ns]
    groups = {
        left: ("tails", {"normal error": "normal", "Student's t, 5": "t5", "Student's t, 2": "t2"}),
        right: ("loop", {f"{size} of 24 squares": f"gold_{size}" for size in (24, 12, 6, 0)}),
    }
    for axis, (run, names) in groups.items():
        seen = [line["metrics"] for line in lines if line["run"] == run]
        for label, name in names.items() if seen else ():
            axis.plot(d, [fmean(m[f"{name}_{n}"] for m in seen) for n in ns], ".-", label=label)
        axis.set(xlabel="d = sqrt(KL)", title={"tails": "proxy = gold + error", "loop": "trained proxy"}[run])
        axis.axhline(0, color="grey", linewidth=0.5)
        if seen:
            axis.legend(fontsize="small", loc="upper left")
    left.set_ylabel("gold score of best-of-n")
