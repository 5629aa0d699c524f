"""Bias and variance of the policy gradient against lambda, of the sampled episodes."""

LAMBDAS = ("0", "0.5", "0.8", "0.95", "1")


def plot(figure, lines):
    """Each world's curve, and their mean."""
    metrics = [line["metrics"] for line in lines if line["run"] == "sampled"]
    bias, variance = figure.subplots(1, 2)
    for name, colour in (("wrong", "tab:red"), ("exact", "tab:blue")):
        for axis, what in ((bias, "bias"), (variance, "variance")):
            curves = [[m[f"{name}_{what}_{lam}"] for lam in LAMBDAS] for m in metrics]
            for curve in curves:
                axis.plot(LAMBDAS, curve, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(
                LAMBDAS, [sum(c) / len(c) for c in zip(*curves)], color=colour, marker="o", label=f"{name} values"
            )
    bias.set(title="bias over |g|", xlabel="λ", yscale="log")
    variance.set(title="total variance", xlabel="λ", yscale="log")
    bias.legend()
