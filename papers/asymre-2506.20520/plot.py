"""Gain in mean reward during training, and how many arms are left."""


def plot(figure, lines):
    """A curve for each baseline, of the newest seed."""
    metrics = lines[-1]["metrics"]
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    shifts = (-1.0, -0.2, -0.05, -0.02, 0.0, 0.05, 0.2)
    for i, (shift, course) in enumerate(zip(shifts, metrics["course"])):
        left.plot(metrics["steps"][1:], course[1:], f"C{i}", label=f"{shift:+g}", ls="-" if shift < 0 else "--")
    left.set_xscale("log")
    left.set_xlabel("step of gradient ascent")
    left.set_title("mean reward over that of $\\mu$", fontsize=10)
    left.legend(title="$V - V^\\mu$", fontsize=8, title_fontsize=8)
    bars = right.bar(range(len(shifts)), metrics["support"], color=[f"C{i}" for i in range(len(shifts))])
    right.bar_label(bars, [f"{x:.3g}" for x in metrics["support"]], fontsize=8)
    right.set_xticks(range(len(shifts)), [f"{x:+g}" for x in shifts], fontsize=8, rotation=45)
    right.set_xlabel("$V - V^\\mu$")
    right.set_title("arms left, of 100", fontsize=10)
