"""Environments: rollouts of several turns, in which a plain function answers the model.

`step(messages) -> (observation, reward, done)` reads the conversation so far, the assistant's newest turn last, and
says what the model reads next. It has no state of its own: what it needs to know stands in the messages, or in columns
of the prompt's row, which it gets as arguments of their names: `step(messages, answer)`.

Tokens go in as they came out: what the model wrote is never encoded again, and between its turns stand the tokens of
observations, which do not count. A prompt of messages goes on in the tokenizer's chat template. Any other prompt is
plain text, in which the model's turns and the observations are lines.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from alignkit import data
from alignkit.hf.calls import Call, place, start
from alignkit.hf.data import encode
from alignkit.hf.models import Policy
from alignkit.hf.processes import row_seeds
from alignkit.hf.sampling import Answer, answers
from alignkit.types import Batch

Messages = list[dict[str, Any]]

TURN, HEARD = "|the turn|", "|the observation|"  # stand for them where a chat template shows what it puts between them


@dataclass(frozen=True)
class Environment:
    """A step function, the name it has in errors, and the limits of an episode.

    `step(messages, **columns)`, which may be async, returns (observation, reward, done): a string, which a user says,
    or a list of messages; the reward of this turn; whether the episode is done, in which case nobody reads the
    observation. The steps of several rows run at the same time. Raises ValueError for a limit out of range.
    """

    step: Callable[..., Any]
    name: str
    _: KW_ONLY
    turns: int = 8
    """Turns of the model, at most."""
    timeout: float = 60.0
    """Seconds that a step may take."""

    def __post_init__(self) -> None:
        if not (callable(self.step) and inspect.signature(self.step).parameters):
            raise ValueError(f"step={self.step!r} must be a function of the messages")
        if self.turns < 1:
            raise ValueError(f"turns={self.turns} must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be a positive number of seconds")

    def play(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Any],
        *,
        n: int = 1,
        greedy: bool = False,
        seed: int = 0,
        step: int = 0,
    ) -> Batch:
        """`n` episodes of each prompt in `n` consecutive rows, a turn having `policy.sampling.max_new` tokens at most.

        Columns: those of `hf.sample`, with `mask` True on every turn of the model; `rewards` [R], the sum over the
        turns; `turns` [R], how many were played; `turn_rewards` [R, self.turns], 0 after the last; `turn` [R, T], the
        number, from 0, of a token's turn (an observation is read in the turn after it).

        An episode ends when the step says so, and otherwise as `truncated`: with a turn that was cut off (whose reward
        counts), after `self.turns`, or where a whole turn no longer fits into the model's positions. As in `hf.sample`,
        a row does not depend on the others, and of one turn it is the row that `hf.sample` returns.

        Raises ValueError, with the conversation, if a step raises, takes too long or returns anything else.
        """
        if not prompts or n < 1:
            raise ValueError(f"prompts has {len(prompts)} rows and n={n}: both must be at least 1")
        rows = [x if isinstance(x, Mapping) else {"prompt": x} for x in prompts]
        episodes = [_Episode(tokenizer, row["prompt"], self._arguments(row)) for row in rows for _ in range(n)]
        seeds = row_seeds(len(episodes), seed=seed, step=step)
        room = (getattr(policy.config, "max_position_embeddings", None) or math.inf) - policy.sampling.max_new
        for turn in range(self.turns):
            places = [i for i, episode in enumerate(episodes) if not episode.over]
            if not places:
                break
            own = [data.mix(seeds[i], turn) if turn else seeds[i] for i in places]
            active, each = [episodes[i] for i in places], 1 if turn else n  # a prompt is encoded once for its n rows
            drawn = answers(policy, tokenizer, [x.ids for x in active[::each]], n=each, greedy=greedy, seeds=own)
            for episode, answer in zip(active, drawn):
                episode.write(answer)
            for episode, answer, (observation, reward, done) in zip(active, drawn, self._outcomes(active)):
                episode.rewards.append(reward)
                episode.truncated = answer.truncated or not done
                ended = done or answer.truncated or turn + 1 == self.turns
                episode.over = ended or not episode.read(observation, room)
        return data.collate([episode.columns(self.turns) for episode in episodes])

    def _arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of the row that the step names, or all if it takes any."""
        first, *others = inspect.signature(self.step).parameters.values()
        if any(x.kind is x.VAR_KEYWORD for x in others):
            return {name: x for name, x in row.items() if name != first.name}
        missing = [x.name for x in others if x.default is x.empty and x.name not in row]
        if missing:
            raise ValueError(f"environment={self.name!r}: its step takes {missing}, but the row has {sorted(row)}")
        return {x.name: row[x.name] for x in others if x.name in row}

    def _outcomes(self, episodes: Sequence["_Episode"]) -> list[tuple[Any, float, bool]]:
        calls = [Call(partial(self.step, copy.deepcopy(x.messages), **x.arguments)) for x in episodes]
        with ExitStack() as stack:
            start(calls, stack)
            return [self._outcome(episode, call) for episode, call in zip(episodes, calls)]

    def _outcome(self, episode: "_Episode", call: Call) -> tuple[Any, float, bool]:
        if not call.wait(self.timeout):
            wrong = f"took longer than timeout={self.timeout:g} seconds"
        elif isinstance(call.error, Exception):
            wrong = f"raised {type(call.error).__name__}: {call.error}{place(call.error)}"
        elif call.error is not None:  # such as a SystemExit
            raise call.error
        else:
            wrong = _fault(call.value)
        if wrong:
            told = "\n".join(f"  {x.get('role')}: {x.get('content')!s:.500}" for x in episode.messages)
            raise ValueError(f"environment={self.name!r}: its step {wrong}, after\n{told}") from call.error
        return call.value[0], float(call.value[1]), bool(call.value[2])


@dataclass
class _Episode:
    """A row while it is played."""

    tokenizer: Any
    prompt: InitVar[Any]
    arguments: dict[str, Any]
    rewards: list[float] = field(default_factory=list)
    truncated: bool = False
    over: bool = False

    def __post_init__(self, prompt: Any) -> None:
        self.ids = encode(self.tokenizer, prompt)
        if not isinstance(prompt, str) and all(isinstance(x, int) for x in prompt):
            prompt = self._text(prompt, skip_special_tokens=True)
        self.chat = not isinstance(prompt, str)
        self.messages: Messages = list(prompt) if self.chat else [{"role": "user", "content": prompt}]
        self.mask, self.turn = [False] * len(self.ids), [0] * len(self.ids)
        self.logps: list[float] | None = [0.0] * len(self.ids)

    def write(self, answer: Answer) -> None:
        """Add a turn of the model."""
        self._add(answer.ids, answer.logps, mask=True)
        self.messages.append({"role": "assistant", "content": self._text(answer.ids, skip_special_tokens=True)})
        self.written = self._text(answer.ids, skip_special_tokens=False)

    def read(self, observation: str | Messages, room: float) -> bool:
        """Add an observation and the header of the model's next turn, if they end within `room` tokens; whether so."""
        said = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        ids = self._between(said)
        fits = len(self.ids) + len(ids) <= room
        if fits:
            self._add(ids, [0.0] * len(ids), mask=False)
            self.messages += said
        return fits

    def columns(self, turns: int) -> dict[str, Any]:
        """The row of the batch."""
        played = len(self.rewards)
        row = {"ids": self.ids, "mask": self.mask, "truncated": self.truncated}
        row |= {"sampler_logps": self.logps} if self.logps is not None else {}
        row |= {"rewards": math.fsum(self.rewards), "turns": played, "turn": self.turn}
        return row | {"turn_rewards": self.rewards + [0.0] * (turns - played)}

    def _add(self, ids: list[int], logps: list[float] | None, *, mask: bool) -> None:
        """Add tokens; a row has no log-probs once those of one turn are unknown."""
        self.ids = self.ids + ids
        self.mask += [mask] * len(ids)
        self.turn += [len(self.rewards)] * len(ids)
        self.logps = None if logps is None or self.logps is None else self.logps + logps

    def _between(self, said: Messages) -> list[int]:
        """The tokens between the model's turn and its next, without the end of turn that the model wrote itself.

        What the model wrote is not shown to the template, which might write it differently once another turn follows.
        """
        if self.chat:
            past = [*self.messages[:-1], {"role": "assistant", "content": TURN}]
            whole = self._after_turn([*past, *said])
            lead, *others = self._after_turn([*past, *({**x, "content": HEARD} for x in said)]).split(HEARD)
            if len(others) != len(said):
                raise ValueError(f"the chat template does not write every message of {said!r:.200}")
        else:
            lead, whole = "\n", "".join(f"\n{x['content']}" for x in said) + "\n"
        written = (self.written, self.written.removesuffix(self.tokenizer.eos_token))
        start = self._encode(lead)
        ends = (self._text(start[:k], skip_special_tokens=False) for k in range(len(start), 0, -1))
        return self._encode(whole.removeprefix(next((x for x in ends if any(y.endswith(x) for y in written)), "")))

    def _after_turn(self, messages: Messages) -> str:
        """What the chat template writes behind `TURN`, up to where the model goes on."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template does not go on with {messages[-1]!r:.200}: {error}") from error
        _, found, after = text.rpartition(TURN)
        if not found:
            raise ValueError("the chat template does not write what the assistant said")
        return after

    def _text(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _fault(result: Any) -> str:
    """What is wrong with what a step returned, if anything is."""
    if not (isinstance(result, tuple) and len(result) == 3):
        return f"returned {result!r:.200}, but must return (observation, reward, done)"
    observation, reward, done = result
    if not isinstance(done, bool | np.bool_):
        return f"returned done={done!r:.200}, which must be True or False"
    if not (isinstance(reward, Real) and math.isfinite(reward)):
        return f"returned reward={reward!r:.200}, which must be a finite number"
    messages = isinstance(observation, list) and all(isinstance(x, dict) and "content" in x for x in observation)
    if not (done or isinstance(observation, str) or (messages and observation)):
        return f"returned observation={observation!r:.200}, which must be a string or messages, as it is not done"
    return ""
