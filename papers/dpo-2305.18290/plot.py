"""Reward against KL of all runs of one seed, and the optimal frontier."""

NAMES = {
    "rl_true": "RL, true reward",
    "rl_learned_2000": "RL, learned reward",
    "dpo_2000": "DPO",
    "unlikelihood_2000": "unlikelihood",
    "preferred_2000": "Preferred-FT",
}


def plot(figure, lines):
    """Left: points of one seed, linear, 2000 labels. Right: mean gap to the frontier against the number of labels."""
    seeds = [line["metrics"] for line in lines if line["run"] == "linear"]
    if not seeds:
        return
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(*seeds[0]["optimal_points"], color="black", label="optimal")
    for name, label in NAMES.items():
        (dots,) = left.plot(*seeds[0][f"{name}_points"], ".", label=label)
        sizes = [200, 2000, 20000]
        metrics = [name if name == "rl_true" else name.replace("2000", str(size)) for size in sizes]
        gaps = [sum(m[metric] for m in seeds) / len(seeds) for metric in metrics]
        right.plot(sizes, gaps, marker="o", color=dots.get_color())
    left.set(xlabel="KL(pi || ref)", ylabel="expected reward")
    left.legend(fontsize="small")
    right.set(xscale="log", yscale="log", xlabel="labels", title="mean gap to the optimal reward")
    right.set_yticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    right.minorticks_off()
    right.title.set_fontsize("small")
