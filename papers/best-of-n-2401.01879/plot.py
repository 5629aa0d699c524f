"""KL and win rate of best-of-n for equally likely answers, with their bounds."""

from math import log


def plot(figure, lines):
    """Both against n."""
    metrics = next((line["metrics"] for line in reversed(lines) if line["run"] == "uniform"), None)
    if not metrics:
        return
    left, right = figure.subplots(1, 2)
    ns = [2**i for i in range(len(metrics["curve_2"]))]
    left.plot(ns, [log(n) - (n - 1) / n for n in ns], "k:", label="log n - (n - 1) / n")
    right.plot(ns, [n / (n + 1) for n in ns], "k:", label="n / (n + 1)")
    for answers in (1000, 10, 2):
        for axis, values in zip((left, right), zip(*metrics[f"curve_{answers}"])):
            axis.plot(ns, values, label=f"{answers} answers")
    left.set(xscale="log", xlabel="n", title="KL to the reference (nats)")
    right.set(xscale="log", xlabel="n", title="win rate")
    left.legend()
    right.legend()
