"""PPO on a reward model or any other reward (Ziegler et al. 2019, arXiv:1909.08593; Schulman et al. 2017, 1707.06347).

L = -E min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + c E max((V - R)^2, (clip(V) - R)^2) / 2, A and R by GAE
"""

from alignkit import cli, hf
from alignkit.advantages import gae
from alignkit.controllers import adaptive_kl
from alignkit.kl import k1
from alignkit.losses.policy import clipped_surrogate
from alignkit.losses.value import clipped_value
from alignkit.masking import masked_sum, whiten
from alignkit.sampling import Sampling
from alignkit.shaping import kl_shaped
from alignkit.weights import row_mean, token_mean, weigh

EPS, GAMMA, LAM, VALUE_COEF, HORIZON = 0.2, 1.0, 0.95, 0.1, 10_000


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # of prompts: file, hub id or builtin:reviews
    reward: str = "builtin:sentiment",  # folder of a reward model, file.py:function or builtin:sentiment
    kl_coef: float = 0.2,  # beta at the start
    kl_target: float = 6.0,  # nats per answer, to which beta is steered
    sampling: Sampling = Sampling(max_new=64),
    rollout: int = 128,  # answers sampled at a time
    epochs: int = 4,  # passes over them
    batch: int = 64,  # answers of one optimizer step
    micro: int = 64,  # answers of one forward pass
    steps: int = 400,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/ppo",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    actor, tok = hf.causal_lm(model, lora=lora, value_head=True, sampling=sampling, seed=seed)
    ref, score, prompts = hf.frozen(actor), hf.reward_fn(reward), hf.prompts(dataset)
    controller = adaptive_kl(coef=kl_coef, target=kl_target, horizon=HORIZON)
    state = {"kl": controller.init()}

    def collect(i):
        b = hf.rollout(actor, tok, prompts, score, n=1, size=rollout, ref=ref, rows=micro, seed=seed, step=i)  # y ~ pi
        kl, mask = k1(b["old_logps"], b["ref_logps"]), b["mask"]
        rewards = kl_shaped(b["rewards"], kl, mask, coef=state["kl"].coef)  # r(x, y) - beta KL
        advantages, returns = gae(rewards, b["values"], mask, gamma=GAMMA, lam=LAM)  # GAE
        kl = masked_sum(kl, mask, dim=-1)
        state["kl"] = controller.update(state["kl"], kl.mean(), rollout)  # adapt beta
        return b | {"kl": kl, "advantages": whiten(advantages, mask), "returns": returns}

    def loss_fn(actor, ids, mask, old_logps, values, kl, rewards, advantages, returns, weights, rows, **_):
        logps, new_values = actor(ids, mask)
        loss = clipped_surrogate(logps, old_logps, advantages, low=EPS, high=EPS)
        loss = loss + VALUE_COEF * clipped_value(new_values, values, returns, clip=EPS)
        return weigh(loss, weights), {"score": weigh(rewards, rows), "kl": weigh(kl, rows)}

    batches = hf.on_policy(collect, state, size=batch, epochs=epochs, seed=seed)  # epochs of clipped updates
    aggregate = {"weights": token_mean, "rows": row_mean}
    hf.fit(loss_fn, actor, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(actor, tok, out)


if __name__ == "__main__":
    cli.run(main)
