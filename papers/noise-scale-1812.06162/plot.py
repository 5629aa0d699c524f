"""Biases of the estimates, and the best step against the size of the batch."""


def plot(figure, lines):
    """Of all seeds on the left, of three on the right."""
    left, right = figure.subplots(1, 2)
    metrics = [line["metrics"] for line in lines if line["run"] == "estimates"]
    names = {"signal_1": "|G|²", "noise_1": "tr Σ", "naive_signal": "|g|² of\na batch"}
    for i, name in enumerate(names):
        left.plot([i] * len(metrics), [m[name] for m in metrics], "o", alpha=0.5)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(xlim=(-0.5, 2.5), ylim=(0, 10))
    left.set_xticks(range(len(names)), names.values(), fontsize="small")
    left.set_title("mean over all batches / truth", fontsize="medium")
    for seed, line in enumerate([line["metrics"] for line in lines if line["run"] == "steps"][:3]):
        sizes = [0.25 * 1.1**i for i in range(50)]
        right.plot(sizes, [1 / (1 + line["plain_exact"] / b) for b in sizes], color=f"C{seed}")
        right.plot(line["sizes"], line["plain_steps"], "o", color=f"C{seed}", label=f"b = {line['plain_exact']:.2g}")
    right.set(xscale="log", xlabel="B")
    right.set_title("best step: 1 / (1 + b / B), and found", fontsize="medium")
    right.legend()
