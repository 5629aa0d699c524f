"""Variance of the baselines, and where the greedy one helps."""


def plot(figure, lines):
    """Left: variances with k = 4, a line for each draw. Right: two arms, shaded where ReMax has less than none."""
    left, right = figure.subplots(1, 2)
    names = {"none": "none", "remax": "greedy\n(ReMax)", "rloo": "others\n(RLOO)"}
    for line in (x for x in lines if x["run"] == "groups"):
        left.plot(list(names.values()), [line["metrics"][f"{x}4_variance"] for x in names], ".-", color="C0", alpha=0.6)
    left.set(yscale="log", ylabel="variance / |gradient|², k = 4", xlabel="baseline")
    arms = next((x["metrics"] for x in lines if x["run"] == "arms"), None)
    if arms:
        right.imshow(arms["map"], origin="lower", extent=(0, 1, 0, 1), cmap="Blues", vmax=2)
        ratio = [i / 100 for i in range(51)]
        right.plot(ratio, [0.5 + 0.5 * x / (1 - x) for x in ratio], "k", label="1/2 + r2 / (2 (r1 - r2))")
        right.legend(loc="lower right")
    right.set(xlabel="r2 / r1", ylabel="chance of the better arm", title="shaded: ReMax varies less")
