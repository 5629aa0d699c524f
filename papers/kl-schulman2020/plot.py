"""Standard deviation and bias of the estimators over the true KL."""


def plot(figure, lines):
    """Bars for the two tables."""
    metrics = lines[-1]["metrics"]
    for axis, case in zip(figure.subplots(1, 2), ("near", "far")):
        for i, what in enumerate(("bias", "sd")):
            values = [abs(metrics[f"{case}_{k}_{what}"]) for k in ("k1", "k2", "k3")]
            bars = axis.bar([x + (i - 0.5) * 0.4 for x in range(3)], values, 0.4, label=what)
            axis.bar_label(bars, [f"{x:.3g}" if x > 1e-9 else "0" for x in values])
        axis.set_xticks(range(3), ["k1", "k2", "k3"])
        axis.set_title({"near": "p = N(0.1, 1)", "far": "p = N(1, 1)"}[case])
    axis.legend()
    figure.supylabel("over the true KL(q || p)")
