"""The policies that DPO and KTO end at where 60 % of the labels prefer a."""


def plot(figure, lines):
    """Probability of a against beta, for several references."""
    metrics, axis = lines[-1]["metrics"], figure.subplots()
    for name in sorted(name for name in metrics if name.startswith("dpo_ref_")):
        axis.plot(metrics["betas"], metrics[name], marker="o", label=f"DPO, ref(a) = {name[8:]}")
    axis.axhline(1, color="black", linestyle="--", label="KTO, any reference")
    axis.axhline(0.5, color="grey", linestyle=":")
    axis.text(0.1, 0.03, "below 1/2 the minority's answer is preferred", color="grey")
    axis.set(xscale="log", xlabel="beta", ylabel="optimal pi(a)", ylim=(0, 1.05), xlim=(0.09, 20))
    axis.legend(loc="center right", fontsize="small")
