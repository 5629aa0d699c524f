"""Two small environments: `builtin:guessing`, to find a number, and `builtin:calculator`, to compute with a tool.

Each has a step function for `Environment`, and rows of prompt, messages (an episode as it should be, for `hf.text`)
and answer.
"""

import ast
import operator
import random
import re
from collections.abc import Callable
from typing import Any

from datasets import Dataset

Messages = list[dict[str, Any]]
Outcome = tuple[str, float, bool]

SIZES = {"train": (4096, 0), "test": (512, 1)}
HIGHEST = 20
LONGEST = 200  # characters of an expression, so that no number is large
ALLOWED = f"only numbers, + - * / // % and parentheses, up to {LONGEST} characters"
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def guessing_step(messages: Messages, answer: int) -> Outcome:
    """The last number of the turn is the guess: "higher" or "lower" than it is the answer; 1 once it is found."""
    numbers = re.findall(r"\d+", messages[-1]["content"])
    guess = int(numbers[-1][:9]) if numbers else None
    if guess is None:
        return "Say a number.", 0.0, False
    if guess == answer:
        return "Yes.", 1.0, True
    return ("higher" if guess < answer else "lower"), 0.0, False


def calculator_step(messages: Messages, answer: float) -> Outcome:
    """`calc(...)` is computed; "answer: N" ends the episode, with 1 if N is the answer and 0 if it is not."""
    text = messages[-1]["content"]
    final = re.findall(r"answer:\s*(-?\d[\d,]{0,30}(?:\.\d{1,30})?)", text)
    if final:
        return "", float(abs(float(final[-1].replace(",", "")) - answer) < 1e-6), True
    tool = re.search(r"calc\((.*)\)", text)
    if not tool:
        return "Say calc(...) or answer: N.", 0.0, False
    try:
        return calculate(tool[1]), 0.0, False
    except (ArithmeticError, SyntaxError, ValueError) as error:
        return f"error: {error}", 0.0, False


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % and parentheses, to 10 digits if it is no whole number.

    Raises ArithmeticError, SyntaxError or ValueError for anything else; nothing is executed.
    """
    if len(expression) > LONGEST or not re.fullmatch(r"[0-9 .+*/%()-]*", expression):
        raise ValueError(ALLOWED)
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def _value(node: ast.AST) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(operand=operand, op=op) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
    raise ValueError(ALLOWED)


def guessing(n: int = 4096, *, seed: int = 0, highest: int = HIGHEST) -> list[dict[str, Any]]:
    """`n` rows whose answer is a number from 1 to `highest`, found by halving what is left."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        low, high, answer = 1, highest, rng.randint(1, highest)
        prompt = [{"role": "user", "content": f"Guess my number from 1 to {highest}."}]
        messages, done = prompt, False
        while not done:
            guess = (low + high) // 2
            messages = [*messages, {"role": "assistant", "content": str(guess)}]
            observation, _, done = guessing_step(messages, answer)
            low, high = (guess + 1, high) if observation == "higher" else (low, guess - 1)
            messages = messages if done else [*messages, {"role": "user", "content": observation}]
        rows.append({"prompt": prompt, "messages": messages, "answer": answer})
    return rows


def calculator(n: int = 4096, *, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows that ask for a * b + c, or minus c; the answer is what the calculator says."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        expression = f"{rng.randint(11, 99)}*{rng.randint(11, 99)}{rng.choice('+-')}{rng.randint(1, 99)}"
        result = calculate(expression)
        turns = [f"What is {expression}?", f"calc({expression})", result, f"answer: {result}"]
        messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, turns)]
        rows.append({"prompt": messages[:1], "messages": messages, "answer": int(result)})
    return rows


def load_guessing(split: str) -> Dataset:
    """`builtin:guessing`: 4,096 rows to train on, 512 others to test on."""
    return _load(guessing, split, "builtin:guessing")


def load_calculator(split: str) -> Dataset:
    """`builtin:calculator`: 4,096 rows to train on, 512 others to test on."""
    return _load(calculator, split, "builtin:calculator")


def _load(rows: Callable[..., list[dict[str, Any]]], split: str, name: str) -> Dataset:
    if split not in SIZES:
        raise ValueError(f"split={split!r} of {name} must be one of {sorted(SIZES)}")
    n, seed = SIZES[split]
    return Dataset.from_list(rows(n, seed=seed))


STEPS = {"builtin:guessing": guessing_step, "builtin:calculator": calculator_step}
