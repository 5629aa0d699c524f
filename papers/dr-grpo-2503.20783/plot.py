"""Weights of questions by difficulty, and mean lengths in training."""

LABELS = {
    "grpo": "GRPO", "no_std": "GRPO without std", "group_tokens": "tokens of a group",
    "all_tokens": "tokens of the batch", "dr_grpo": "Dr. GRPO",
}  # fmt: skip


def plot(figure, lines):
    """Left: p against the weight. Right: lengths over the start's, of wrong answers solid and of right ones dashed."""
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    newest = {line["run"]: line["metrics"] for line in lines}
    if "difficulty" in newest:
        for values, label in zip(newest["difficulty"]["shares"], ("divided by std", "centred")):
            left.plot([0.02, 0.1, 0.5, 0.9, 0.98], values, "o-", label=label)
        left.legend()
    left.set(xlabel="success rate p", ylabel="weight of the question", ylim=(0, None))
    runs = [line["metrics"] for line in lines if line["run"] == "drift"]
    for i, (name, label) in enumerate(LABELS.items() if runs else ()):
        paths = [run[f"{name}_path"] for run in runs]
        for kind, style in enumerate(("-", "--")):
            mean = [sum(point[kind] for point in points) / len(points) for points in zip(*paths)]
            right.plot(range(0, 20 * len(mean), 20), mean, style, color=f"C{i}", label=None if kind else label)
    right.set(xlabel="update", ylabel="mean length / start", yscale="log", title="wrong (solid), right (dashed)")
    if runs:
        right.legend(fontsize="small", loc="center right", bbox_to_anchor=(1, 0.235))
