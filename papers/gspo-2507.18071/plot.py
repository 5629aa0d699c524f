"""Share of clipped tokens against the length of answers."""

LENGTHS = (100, 1000, 8000, 32_000)
LABELS = {
    "gspo": "GSPO, log-ratios of mean 0",
    "drift_gspo": "GSPO, ratios of mean 1",
    "grpo": "GRPO",
}


def plot(figure, lines):
    """Means over seeds."""
    axis = figure.subplots()
    metrics = [line["metrics"] for line in lines if line["run"] == "clipped"]
    for name, label in LABELS.items():
        shares = [sum(m[f"{name}_{length}"] for m in metrics) / len(metrics) for length in LENGTHS]
        axis.plot(LENGTHS, shares, "o-", label=label)
    axis.set(xscale="log", yscale="log", xlabel="tokens of an answer", ylabel="share of tokens clipped")
    axis.legend()
