from alignkit import sampling
from alignkit.testing.strategies import VOCAB
from tests.specs.base import row

for name, options in {
    "": {"temperature": 0.7},
    "[top-k]": {"top_k": 2},
    "[top-p]": {"top_p": 0.6},
    "[min-p]": {"min_p": 0.3},
    "[all]": {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
}.items():
    row(
        f"sampling.filter_logits{name}",
        lambda logits, options=options: sampling.filter_logits(logits, **options),
        lambda s: {"logits": s.real(*s.lead, VOCAB)},
        "rows alone vmap dtype",
    )
row(
    "sampling.invert",
    sampling.invert,
    lambda s: {"probs": s.real(*s.lead, VOCAB).softmax(-1), "uniform": s.real(*s.lead).sigmoid()},
    "rows alone vmap",
)
row(
    "sampling.draw",
    sampling.draw,
    lambda s: {"logits": s.real(*s.lead, VOCAB), "uniform": s.real(*s.lead).sigmoid()},
    "rows alone vmap",
)
