"""Bias against variance of each kind of weight, as the mismatch grows."""

COLOURS = {"none": "tab:gray", "token_is": "tab:orange", "token_tis": "tab:red"}
COLOURS |= {"sequence_is": "tab:blue", "sequence_tis": "tab:green"}
MISMATCHES = ("0.25", "0.5", "1")


def plot(figure, lines):
    """Means over worlds."""
    metrics = [line["metrics"] for line in lines]
    for axis, what in zip(figure.subplots(1, 2), ("bias", "variance")):
        for i, (name, colour) in enumerate(COLOURS.items()):
            means = [sum(m[f"{name}_{what}_{x}"] for m in metrics) / len(metrics) for x in MISMATCHES]
            axis.bar([j + 0.17 * (i - 2) for j in range(3)], means, 0.17, color=colour, label=name.replace("_", " "))
        axis.set(title=what + (" over |g|" if what == "bias" else " of one answer"), xlabel="mismatch")
        axis.set_xticks(range(3), MISMATCHES)
        axis.set_yscale("linear" if what == "bias" else "log")
    figure.axes[0].legend(fontsize="small")
