"""`builtin:arithmetic`: additions written out with their carries, whose last number can be checked."""

import random
import re

from datasets import Dataset

DIGITS = 2
SIZES = {"train": (8192, 0), "test": (512, 1)}


def arithmetic(n: int = 8192, *, seed: int = 0, digits: int = DIGITS) -> list[dict[str, str]]:
    """`n` rows of prompt ("47+85="), completion ("7+5=12 4+8+1=13 132") and answer ("132").

    The completion adds the digits from the last on, each with the carry of the one before, and ends with the sum.
    """
    rng, rows = random.Random(seed), []
    for _ in range(n):
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        work, carry = [], 0
        for x, y in zip(map(int, reversed(str(a))), map(int, reversed(str(b)))):
            work.append(f"{x}+{y}" + "+1" * carry + f"={x + y + carry}")
            carry = (x + y + carry) // 10
        rows.append({"prompt": f"{a}+{b}=", "completion": " ".join([*work, str(a + b)]), "answer": str(a + b)})
    return rows


def correct(text: str, answer: str) -> float:
    """1 if the last number of the text is the answer, else 0."""
    return float(re.findall(r"\d+", text)[-1:] == [str(answer)])


def load_arithmetic(split: str) -> Dataset:
    """8,192 rows to train on, 512 others to test on."""
    if split not in SIZES:
        raise ValueError(f"split={split!r} of builtin:arithmetic must be one of {sorted(SIZES)}")
    n, seed = SIZES[split]
    return Dataset.from_list(arithmetic(n, seed=seed))
