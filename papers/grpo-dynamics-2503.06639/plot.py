"""The counter-example to unconditional convergence, by the size of the groups."""


def plot(figure, lines):
    """Success rates along the iteration from p_ref = 0.001 with beta = 3."""
    axis = figure.subplots()
    metrics = next((line["metrics"] for line in reversed(lines) if line["run"] == "groups"), {})
    for size, label in (("8", "8"), ("64", "64"), ("512", "512"), ("endless", "without end (the paper's), eps = 1e-5")):
        if metrics:
            axis.plot(metrics[f"path_{size}"], ".-" if size == "endless" else "-", label=label)
    axis.axhline(0.001, color="k", linestyle=":", label="p_ref")
    axis.set(yscale="log", ylim=(5e-4, 30), xlabel="iteration", ylabel="success rate", title="p_ref = 0.001, beta = 3")
    axis.legend(title="answers in a group", ncols=3, fontsize="small", loc="upper right")
