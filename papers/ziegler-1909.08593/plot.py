"""The controller's loop, and torch's update over TensorFlow's for constant gradients."""


def plot(figure, lines):
    """KL against updates; ratio of updates against steps."""
    metrics = {line["run"]: line["metrics"] for line in lines}
    left, right = figure.subplots(1, 2)
    if "controller" in metrics:
        left.plot(metrics["controller"]["kls"][:100], label="KL = 1 / (2 beta²)")
        left.axhline(6, color="grey", linestyle=":", label="target")
        left.set(xlabel="update", ylabel="KL (nats)", title="KL controller")
        left.legend()
    if "adam" in metrics:
        for exponent, ratio in zip((1, 3, 5, 7), metrics["adam"]["ratio"]):
            right.loglog(range(1, len(ratio) + 1), ratio, label=f"gradient 1e-{exponent}")
        right.set(xlabel="step", title="Adam update: torch / TF")
        right.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
        right.legend()
