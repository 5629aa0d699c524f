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
from alignkit.shaping import kl_shaped
from alignkit.train import infer, rollouts
from alignkit.weights import row_mean, token_mean, weigh

EPS, GAMMA, LAM, VALUE_COEF, HORIZON = 0.2, 1.0, 0.95, 0.1, 10_000


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # of prompts: file, hub id or builtin:reviews
    reward: str = "builtin:sentiment",  # folder of a reward model, file.py:function or builtin:sentiment
    kl_coef: float = 0.2,  # beta at the start
    kl_target: float = 6.0,  # nats per answer, to which beta is steered
    max_new: int = 64,  # tokens of an answer
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
    args = hf.arguments(out, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    actor, tok = hf.causal_lm(model, lora=lora, value_head=True, seed=seed)
    ref, score, prompts = hf.frozen(actor), hf.reward_fn(reward), hf.prompts(dataset)
    controller = adaptive_kl(coef=kl_coef, target=kl_target, horizon=HORIZON)
    state = {"kl": controller.init()}

    def collect(i):
        x = next(hf.shuffled(prompts, batch=rollout, seed=seed, start=i))
        ids, mask = hf.sample(actor, tok, x, max_new=max_new, seed=seed, step=i)  # 1. y ~ pi(. | x)
        logps, values = infer(actor, ids, mask, rows=micro)
        kl = k1(logps, infer(ref, ids, mask, rows=micro))
        b = hf.gather(ids=ids, mask=mask, logps=logps, values=values, kl=kl, score=score(tok, x, ids, mask))
        rewards = kl_shaped(b["score"], b["kl"], b["mask"], coef=state["kl"].coef)  # 2. r(x, y) - beta KL
        advantages, returns = gae(rewards, b["values"], b["mask"], gamma=GAMMA, lam=LAM)  # 3. GAE
        kl = masked_sum(b["kl"], b["mask"], dim=-1)
        state["kl"] = controller.update(state["kl"], kl.mean(), rollout)  # 5. adapt beta
        return b | {"kl": kl, "advantages": whiten(advantages, b["mask"]), "returns": returns}

    def batches(step):  # 4. epochs of clipped updates
        return map(hf.share, rollouts(collect, state, size=batch, epochs=epochs, seed=seed, start=step))

    def loss_fn(actor, ids, mask, logps, values, kl, score, advantages, returns, weights, rows):
        new_logps, new_values = actor(ids, mask)
        loss = clipped_surrogate(new_logps, logps, advantages, low=EPS, high=EPS)
        loss = loss + VALUE_COEF * clipped_value(new_values, values, returns, clip=EPS)
        return weigh(loss, weights), {"score": weigh(score, rows), "kl": weigh(kl, rows)}

    aggregate = {"weights": token_mean, "rows": row_mean}
    hf.fit(loss_fn, actor, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(actor, tok, out)


if __name__ == "__main__":
    cli.run(main)
