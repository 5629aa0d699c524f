"""Probabilities while training to prefer No over Never, for two ratios of rates, and falls in a learned geometry."""

TITLES = {"": "hidden state 100 x faster", "_of_equal_rates": "equal rates"}


def plot(figure, lines):
    """Curves of the constructed case, histogram of the learned one."""
    newest = {(x["run"], x["seed"]): x["metrics"] for x in lines}
    *axes, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.8])
    steps = sorted({round(10 ** (i / 20)) for i in range(73)})
    for axis, (end, title) in zip(axes, TITLES.items()):
        for name in ("no", "never", "yes"):
            course = newest["constructed", 0][f"{name}{end}_course"]
            axis.plot(steps, course, label=f"$\\pi$({name.title()})")
        axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_xscale("log")
    axes[0].legend(fontsize=8)
    drops = [x for (run, _), m in newest.items() if run == "learned" for x in m["drops"]]
    right.hist(drops, bins=20)
    right.axvline(0.21, color="k", ls=":", lw=1)
    right.set_title("learned geometry", fontsize=10)
    right.set_xlabel("fall of $\\pi(y_+)$")
