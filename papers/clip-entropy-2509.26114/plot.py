"""Mean entropy during training on random rewards, by clip (low, high)."""

CLIPS = {"none": "none", "low": "0.2, ∞", "high": "1, 0.2", "both": "0.2, 0.2"}
WIDER = {"high_0.28": "0.2, 0.28", "high_0.5": "0.2, 0.5", "low_0.28": "0.28, 0.2", "low_0.5": "0.5, 0.2"}


def plot(figure, lines):
    """Means over seeds for broad and for peaked policies; each seed's change for the broad."""
    broad, peaked, bars = figure.subplots(1, 3)
    for axis, run, title in ((broad, "random_rewards", "broad policies"), (peaked, "random_peaked", "peaked policies")):
        metrics = [line["metrics"] for line in lines if line["run"] == run]
        for name, label in CLIPS.items():
            curves = [m[f"curve_{name}"] for m in metrics]
            axis.plot([sum(x) / len(x) for x in zip(*curves)], label=label)
        axis.set(xlabel="iteration", title=title)
    broad.set_ylabel("entropy, random rewards")
    broad.legend(fontsize="small")
    metrics = [line["metrics"] for line in lines if line["run"] == "random_rewards"]
    for i, name in enumerate(CLIPS | WIDER):
        bars.plot([m[name] for m in metrics], [i] * len(metrics), "o", alpha=0.4)
    bars.set_yticks(range(8), (CLIPS | WIDER).values(), fontsize="small")
    bars.set(title="change, broad", xlabel="nats")
    bars.invert_yaxis()
