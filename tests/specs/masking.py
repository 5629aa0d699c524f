from alignkit import masking
from tests.specs.base import columns, elementwise, row

elementwise("masking.promote", masking.promote, columns("x"), "gradcheck ints")
elementwise("masking.finite_exp", masking.finite_exp, columns("x"), "gradcheck ints")
elementwise("masking.clip", masking.clip, columns("x"), "gradcheck ints", low=-0.6, high=0.4)
for reduce in (masking.masked_sum, masking.masked_mean, masking.masked_var):
    for dim in (None, -1):
        row(
            f"masking.{reduce.__name__}[dim={dim}]",
            lambda x, mask, reduce=reduce, dim=dim: reduce(x, mask, dim),
            lambda s: {"x": s.tokens(), "mask": s.mask()},
            "padding garbage rows vmap dtype ints gradcheck" + (" alone" if dim else ""),
            tokens={"x": 0},
            reduced=dim is None,
            diff=("x",),
            ints=("x",),
        )
for shift_mean in (True, False):
    row(
        f"masking.whiten[shift_mean={shift_mean}]",
        lambda x, mask, shift_mean=shift_mean: masking.whiten(x, mask, shift_mean=shift_mean, eps=0.1),
        lambda s: {"x": s.tokens(), "mask": s.mask()},
        "padding garbage rows vmap dtype ints gradcheck",
        tokens={"x": 0},
        per_token=True,
        diff=("x",),
        ints=("x",),
    )
for count in (masking.lengths, masking.last_index):
    row(f"masking.{count.__name__}", count, lambda s: {"mask": s.mask()}, "padding rows alone vmap")
