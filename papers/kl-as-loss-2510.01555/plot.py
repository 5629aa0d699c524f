"""How wrong the expected gradients are, and what a KL loss alone does to the KL."""

NAMES = {
    "k1_reward": "k1 in reward", "k2": "k2 as loss", "k3": "k3 as loss", "k3_reward": "k3 in reward",
    "off_k2": "k2, off-policy", "off_k2_weighted": "<w> k2, off-policy", "off_k3_weighted": "w k3, off-policy",
}  # fmt: skip


def plot(figure, lines):
    """Left: relative errors, means and values of the seeds. Right: KL along descent."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    tokens = [line["metrics"] for line in lines if line["run"] == "tokens"]
    for i, name in enumerate(NAMES if tokens else ()):
        values = [metrics[name] for metrics in tokens]
        left.barh(i, sum(values) / len(values), color="C0" if max(values) < 1e-9 else "C1", alpha=0.5)
        left.plot(values, [i] * len(values), "k.")
    left.set_yticks(range(len(NAMES)), NAMES.values())
    left.invert_yaxis()
    left.set_xlabel("relative error of the gradient\nof KL(pi || ref)")
    descent = next((line["metrics"] for line in lines if line["run"] == "descent"), None)
    for name, style in (("k1", "-"), ("k2", "-"), ("k3", "--")) if descent else ():
        path = descent[f"{name}_path"]
        right.plot(range(0, 5 * len(path), 5), path, style, label=name)
    right.set(yscale="log", ylim=(1e-6, None), xlabel="step on the loss alone", ylabel="KL(pi || ref)")
    if descent:
        right.legend()
