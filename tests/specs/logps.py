from alignkit import logps
from alignkit.testing.strategies import VOCAB
from tests.specs.base import row

row(
    "logps.token_logps",
    logps.token_logps,
    lambda s: {"logits": s.tokens(VOCAB), "ids": s.ids(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1, "ids": 0},
    per_token=True,
    diff=("logits",),
)
row(
    "logps.sequence_logps",
    logps.sequence_logps,
    lambda s: {"logits": s.tokens(VOCAB), "ids": s.ids(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1, "ids": 0},
    diff=("logits",),
)
for of_logits in (logps.vocab_mean_logps, logps.entropy, logps.log_sum_sq_probs):
    row(
        f"logps.{of_logits.__name__}",
        of_logits,
        lambda s: {"logits": s.tokens(VOCAB), "mask": s.mask()},
        "padding garbage rows alone vmap dtype gradcheck",
        tokens={"logits": 1},
        per_token=True,
        diff=("logits",),
    )
# below, the time axis is moved to where the laws expect it
row(
    "logps.vocab_logps",
    lambda logits, mask: logps.vocab_logps(logits, mask).mT,
    lambda s: {"logits": s.tokens(VOCAB), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1},
    per_token=True,
    diff=("logits",),
)
row(
    "logps.top_candidates",
    lambda logits, mask: logps.top_candidates(logits, mask, k=2).mT,
    lambda s: {"logits": s.tokens(VOCAB), "mask": s.mask()},
    "padding garbage rows alone vmap",
    tokens={"logits": 1},
    per_token=True,
)
row(
    "logps.candidate_logps",
    lambda logits, candidates, mask: logps.candidate_logps(logits, candidates, mask).mT,
    lambda s: {"logits": s.tokens(VOCAB), "candidates": s.integer(0, VOCAB, *s.lead, s.time, 2), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1, "candidates": 0},
    per_token=True,
    diff=("logits",),
)
row(
    "logps.with_tail",
    lambda logps_: logps.with_tail(logps_),
    lambda s: {"logps_": s.tokens(VOCAB).log_softmax(-1)[..., :2]},
    "rows alone vmap dtype gradcheck",
    diff=("logps_",),
)
