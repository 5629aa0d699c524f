"""Environments: laws of the rows that are played, turns joined token by token, faults of steps, and the two games."""

import asyncio
import copy
import re
import sys
import time

import numpy as np
import pytest
import torch

from alignkit import hf
from alignkit.advantages import turn_level
from alignkit.hf import environments, games, processes
from alignkit.hf.data import encode
from alignkit.hf.environments import Environment
from alignkit.hf.sampling import Answer
from alignkit.sampling import Sampling
from alignkit.train import infer
from alignkit.weights import sequence_mean

CHAT = [{"role": "user", "content": "Guess my number from 1 to 9."}]
PROMPTS = ["Film: The Last Letter\nReview:", {"prompt": CHAT, "answer": 7}, {"prompt": [40, 41, 42], "answer": 3}, CHAT]
END, EOS = "<|im_end|>", "<|endoftext|>"
LETTERS = tuple("etaoinsrhdl")  # one of which a random model soon writes, and so ends its turn


@pytest.fixture(scope="module")
def policy():
    return hf.causal_lm("builtin:tiny", sampling=Sampling(max_new=12, stop=LETTERS, temperature=0.8, top_k=300))[0]


def echo(messages):
    """Goes on while the model's turns are short."""
    text = messages[-1]["content"]
    return f"You said {text!r}.", len(text) / 4, len(text) > 5


ECHO = Environment(echo, "echo", turns=4)


@pytest.fixture
def calls(monkeypatch):
    """What `answers` was given and what it returned: one (token ids, seed, answer) for each row of each call."""
    out, real = [], environments.answers

    def recorded(policy, tokenizer, encoded, *, n, greedy, seeds):
        drawn = real(policy, tokenizer, encoded, n=n, greedy=greedy, seeds=seeds)
        out.append(list(zip([list(ids) for ids in encoded for _ in range(n)], seeds, drawn)))
        return drawn

    monkeypatch.setattr(environments, "answers", recorded)
    return out


def say(monkeypatch, player, *, logps=True):
    """Turns are what `player(text so far)` says; one without an end of turn is cut off."""

    def answers(policy, tokenizer, encoded, *, n, greedy, seeds):
        texts = [player(tokenizer.decode(ids)) for ids in encoded for _ in range(n)]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        return [
            Answer(x, [-1.0] * len(x) if logps else None, not text.endswith((END, EOS, "\n")))
            for x, text in zip(ids, texts)
        ]

    monkeypatch.setattr(environments, "answers", answers)


def turns(*texts):
    """A player that says these, one after the other."""
    left = list(texts)
    return lambda _: left.pop(0)


def row(batch, i):
    """A row without its padding."""
    end = int(batch["mask"][i].nonzero()[-1]) + 1
    per_token = ("ids", "mask", "sampler_logps", "turn")
    return {name: x[i, :end].tolist() if name in per_token else x[i].tolist() for name, x in batch.items()}


def written(tokenizer, batch, i=0):
    """The text of a row, and that of the model's turns in it."""
    x = row(batch, i)
    return tokenizer.decode(x["ids"]), tokenizer.decode([t for t, m in zip(x["ids"], x["mask"]) if m])


# laws of the rows


def test_true_tokens_are_what_was_sampled_and_stay_as_they_were(policy, tokenizer, calls):
    batch = ECHO.play(policy, tokenizer, PROMPTS, n=3, seed=1)
    assert len(set(batch["turns"].tolist())) > 2
    assert len(calls) == max(batch["turns"]) == 4
    places = range(12)
    sampled, seen = [[] for _ in places], [[] for _ in places]
    for call in calls:
        for i, (ids, _, answer) in zip(places, call, strict=True):
            seen[i].append(ids)
            sampled[i].append(answer)
        places = [i for i in places if len(sampled[i]) < batch["turns"][i]]
    for i in range(12):
        x = row(batch, i)
        assert seen[i][0] == encode(tokenizer, PROMPTS[i // 3])
        assert [t for t, m in zip(x["ids"], x["mask"]) if m] == [t for answer in sampled[i] for t in answer.ids]
        logps = [logp for logp, m in zip(x["sampler_logps"], x["mask"]) if m]
        assert logps == pytest.approx([logp for answer in sampled[i] for logp in answer.logps])
        for k, (ids, answer) in enumerate(zip(seen[i], sampled[i])):  # every turn begins where the model read to
            end = len(ids) + len(answer.ids)
            assert x["ids"][:end] == ids + answer.ids
            assert x["mask"][len(ids) : end] == [True] * len(answer.ids)
            assert x["turn"][len(ids) : end] == [k] * len(answer.ids)
        texts = [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in sampled[i]]
        outcomes = [echo([{"content": text}]) for text in texts]
        assert x["turn_rewards"] == [reward for _, reward, _ in outcomes] + [0] * (4 - len(texts))
        assert x["rewards"] == sum(x["turn_rewards"])
        assert x["truncated"] == (sampled[i][-1].truncated or not outcomes[-1][2])
        assert not any(done for _, _, done in outcomes[:-1])
        assert x["turn"] == sorted(x["turn"])


def test_the_policy_scores_the_ids_as_they_were_sampled(policy, tokenizer):
    batch = ECHO.play(policy, tokenizer, PROMPTS, n=3)
    logps = infer(policy, batch["ids"], batch["mask"])
    assert (batch["turns"] > 1).any()
    torch.testing.assert_close(logps, batch["sampler_logps"], atol=1e-5, rtol=0)


def test_observations_have_no_part_in_the_gradient(policy, tokenizer):
    batch = ECHO.play(policy, tokenizer, PROMPTS)
    assert not sequence_mean(batch["mask"])[~batch["mask"]].any()
    advantages = turn_level(batch["turn_rewards"], batch["turn"], batch["mask"])
    first = [row(batch, i)["mask"].index(True) for i in range(4)]
    assert advantages[range(4), first].tolist() == batch["turn_rewards"][:, 0].tolist()
    assert not advantages[~batch["mask"]].any()
    assert not infer(policy, batch["ids"], batch["mask"])[~batch["mask"]].any()


@pytest.mark.parametrize("greedy", [False, True])
def test_one_turn_is_the_row_of_sample(policy, tokenizer, greedy):
    options = {"n": 2, "greedy": greedy, "seed": 3, "step": 5}
    batch = Environment(lambda messages: (None, 1, True), "once").play(policy, tokenizer, PROMPTS, **options)
    plain = hf.sample(policy, tokenizer, PROMPTS, **options)
    assert {"ids", "mask", "sampler_logps", "truncated"} <= set(plain) <= set(batch)
    assert all(torch.equal(batch[name], x) for name, x in plain.items())
    assert batch["turns"].tolist() == [1] * 8
    assert (batch["rewards"] == 1).all()


def test_rows_depend_on_seed_step_and_place_but_not_on_other_rows(policy, tokenizer):
    play = lambda prompts, **options: ECHO.play(policy, tokenizer, prompts, **options)  # noqa: E731
    whole = play(PROMPTS, n=2, seed=1)
    assert all(torch.equal(x, whole[name]) for name, x in play(PROMPTS, n=2, seed=1).items())
    others = play([PROMPTS[1], PROMPTS[0], PROMPTS[2], "x", "y"], n=2, seed=1)
    for i in (4, 5):
        x, y = row(whole, i), row(others, i)
        assert x["sampler_logps"] == pytest.approx(y["sampler_logps"], abs=1e-5)
        assert {**x, "sampler_logps": 0} == {**y, "sampler_logps": 0}
    assert not torch.equal(whole["ids"][0], whole["ids"][1])
    for options in ({"seed": 2}, {"seed": 1, "step": 1}):
        assert row(play(PROMPTS[:1], **options), 0) != row(whole, 0)


def test_every_row_and_turn_has_random_numbers_of_its_own(policy, tokenizer, calls, monkeypatch):
    play = lambda: ECHO.play(policy, tokenizer, PROMPTS, n=3, seed=1)  # noqa: E731
    play()
    seeds = [seed for call in calls for _, seed, _ in call]
    assert len(set(seeds)) == len(seeds) > 20
    assert len(calls) > 2
    other = type("Process", (), {"process_index": 1})
    monkeypatch.setattr(processes, "process", other)
    play()
    assert not set(seeds) & {seed for call in calls[4:] for _, seed, _ in call}


# joining the turns


@pytest.mark.parametrize("end", [END, EOS, END + EOS, f"{END}\n{EOS}"])
def test_a_chat_goes_on_as_its_template_does_after_any_end_of_turn(policy, tokenizer, monkeypatch, end):
    say(monkeypatch, turns(f"5{end}", f"7{END}"))
    batch = Environment(games.guessing_step, "guess").play(policy, tokenizer, [PROMPTS[1]])
    own = end if end.startswith(END) else end + END  # the template's end is added only where the model did not write it
    own += "" if "\n" in own else "\n"
    start = "<|im_start|>user\nGuess my number from 1 to 9.<|im_end|>\n<|im_start|>assistant\n5"
    text, counted = written(tokenizer, batch)
    assert text == f"{start}{own}<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n7<|im_end|>"
    assert counted == f"5{end}7{END}"
    assert batch["truncated"].tolist() == [False]


@pytest.mark.parametrize("end", ["\n", EOS, "\n" + EOS])
def test_plain_text_goes_on_in_lines(policy, tokenizer, monkeypatch, end):
    say(monkeypatch, turns(f"5{end}", f"7{end}"))
    row = {"prompt": "From 1 to 9: ", "answer": 7}
    batch = Environment(games.guessing_step, "guess").play(policy, tokenizer, [row])
    line = end if "\n" in end else end + "\n"
    assert written(tokenizer, batch) == (f"From 1 to 9: 5{line}higher\n7{end}", f"5{end}7{end}")


def test_an_end_of_turn_is_left_out_only_as_a_whole(policy, tokenizer, monkeypatch):
    say(monkeypatch, turns(f"5<{EOS}", f"7{END}"))
    row = {"prompt": [{"role": "user", "content": environments.TURN}], "answer": 7}  # which the user may say, too
    text, _ = written(tokenizer, Environment(games.guessing_step, "guess").play(policy, tokenizer, [row]))
    assert text.count(environments.TURN) == 1
    assert f"5<{EOS}{END}\n<|im_start|>user\nhigher" in text


def test_observations_may_be_messages(policy, tokenizer, monkeypatch):
    def step(messages):
        return [{"role": "tool", "content": "4"}, {"role": "user", "content": "And?"}], 0, len(messages) > 3

    for prompt, between, end in [
        (CHAT, "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", END),
        ("Q: ", "4\nAnd?\n", "\n"),
    ]:
        say(monkeypatch, turns(f"calc(2+2){end}", f"so{end}"))
        text, _ = written(tokenizer, Environment(step, "tool").play(policy, tokenizer, [prompt]))
        assert text.endswith(f"calc(2+2){end}{between}so{end}")


def test_a_header_that_the_model_wrote_is_its_end_of_turn(policy, tokenizer, monkeypatch):
    tok = with_template(tokenizer, HEADERS)
    say(monkeypatch, turns(f"5<|im_start|>user{EOS}", f"7{END}"))
    text, _ = written(tok, Environment(games.guessing_step, "guess").play(policy, tok, [PROMPTS[1]]))
    assert text.endswith(f"5<|im_start|>user{EOS}\nhigher<|im_start|>assistant\n7{END}")


def test_blank_lines_between_turns_are_filled_up(policy, tokenizer, monkeypatch):
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    tok = with_template(tokenizer, lines + "{{ 'assistant: ' * add_generation_prompt }}")
    for end in ("\n", "\n\n"):
        say(monkeypatch, turns(f"5{end}", "7\n"))
        text, _ = written(tok, Environment(games.guessing_step, "guess").play(policy, tok, [PROMPTS[1]]))
        assert text.endswith("assistant: 5\n\nuser: higher\n\nassistant: 7\n")


HEADERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer, template):
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = template
    return tok


REWRITES = (
    "{% for m in messages %}"
    "{{ raise_exception('roles must alternate') if m.role != ('user', 'assistant')[loop.index0 % 2] }}"
    "<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)


def test_a_template_that_drops_thoughts_leaves_the_models_tokens_alone(policy, tokenizer, monkeypatch):
    tok = with_template(tokenizer, REWRITES)
    say(monkeypatch, turns(f"so</think>5{END}", f"so</think>7{END}"))
    text, counted = written(tok, Environment(games.guessing_step, "guess").play(policy, tok, [PROMPTS[1]]))
    assert counted == f"so</think>5{END}so</think>7{END}"
    assert f"so</think>5{END}\n<|im_start|>user\nhigher{END}\n<|im_start|>assistant\nso" in text


def test_a_bos_stands_at_the_front_alone(policy, bos_tokenizer, monkeypatch):
    say(monkeypatch, lambda text: "7\n" if "higher" in text else "5\n")
    row = {"prompt": "From 1 to 9: ", "answer": 7}
    batch = Environment(games.guessing_step, "guess").play(policy, bos_tokenizer, [row])
    ids = batch["ids"][0].tolist()
    # the player's own turns are encoded with a BOS
    assert [t for t, m in zip(ids, batch["mask"][0]) if not m].count(bos_tokenizer.bos_token_id) == 1


def test_templates_that_cannot_go_on_are_refused(policy, tokenizer, monkeypatch):
    env = Environment(lambda messages: ([{"role": "tool", "content": "4"}], 0, False), "tool")
    users = "{% for message in messages if message.role != 'tool' %}"
    for template, reason in [
        (tokenizer.chat_template.replace("{% for message in messages %}", users), "does not write every message of"),
        (
            tokenizer.chat_template.replace(
                "{% for", "{{ raise_exception('too many turns') if messages|length > 2 }}{% for", 1
            ),
            "too many",
        ),
        ("{{ messages[0].content }}", "does not write what the assistant said"),
    ]:
        say(monkeypatch, turns(f"5{END}"))
        with pytest.raises(ValueError, match=reason):
            env.play(policy, with_template(tokenizer, template), [CHAT])


# ends of an episode


def test_a_turn_that_is_cut_off_ends_the_episode_and_its_reward_counts(policy, tokenizer, monkeypatch):
    for done in (False, True):
        say(monkeypatch, turns("5"))
        batch = Environment(lambda messages: ("more", 0.5, done), "e").play(policy, tokenizer, [CHAT])  # noqa: B023
        assert batch["truncated"].tolist() == [True]
        assert batch["rewards"].tolist() == [0.5]
        assert batch["turns"].tolist() == [1]


def test_turns_and_positions_are_limits(policy, tokenizer, monkeypatch):
    say(monkeypatch, lambda _: f"5{END}")
    long = "x " * 200  # 400 tokens
    for observation, played in [("more", 4), (long, 3)]:
        batch = Environment(lambda messages: (observation, 1, False), "e", turns=4).play(policy, tokenizer, [CHAT])  # noqa: B023
        assert batch["turns"].tolist() == [played]
        assert batch["turn_rewards"].tolist() == [[1] * played + [0] * (4 - played)]
        assert batch["truncated"].tolist() == [True]
        assert written(tokenizer, batch)[0].endswith(f"5{END}")  # nobody reads the last observation
        assert batch["ids"].shape[1] <= 1024


def test_a_turn_begins_only_where_all_of_it_fits(policy, tokenizer, monkeypatch):
    say(monkeypatch, lambda _: f"5{END}")
    env = Environment(lambda messages: ("more", 1, False), "e", turns=2)
    between = env.play(policy, tokenizer, [CHAT])["mask"][0].tolist()
    whole = len(between) - 2  # tokens that the model reads before its second turn
    prompt = encode(tokenizer, CHAT)
    for free, played in [(12, 2), (11, 1)]:
        long = [{"role": "user", "content": CHAT[0]["content"] + "!" * (1024 - whole - free)}]
        assert len(encode(tokenizer, long)) == len(prompt) + 1024 - whole - free
        assert env.play(policy, tokenizer, [long])["turns"].tolist() == [played]


def test_without_log_probs_of_the_sampler_there_is_no_column(policy, tokenizer, monkeypatch):
    say(monkeypatch, lambda _: f"5{END}", logps=False)
    batch = Environment(echo, "echo", turns=2).play(policy, tokenizer, [CHAT])
    assert "sampler_logps" not in batch
    assert batch["turns"].tolist() == [2]


# steps


def test_a_step_gets_the_columns_that_it_names(policy, tokenizer, monkeypatch):
    seen = []

    def named(messages, answer, missing="default"):
        seen.append((messages, answer, missing))
        messages[0]["content"] = "changed"
        messages.append("garbage")
        return "next", 0, len(seen) > 1

    x = {"prompt": "Say: ", "answer": 7, "messages": "not these", "other": 1}
    say(monkeypatch, turns("5\n", "6\n"))
    Environment(named, "named").play(policy, tokenizer, [x])
    user, first = {"role": "user", "content": "changed"}, {"role": "assistant", "content": "5\n"}
    assert seen[0] == ([user, first, "garbage"], 7, "default")
    last = [{"role": "user", "content": "next"}, {"role": "assistant", "content": "6\n"}]
    assert seen[1][0] == [user, first, *last, "garbage"]
    assert x["prompt"] == "Say: "

    def anything(messages, **columns):
        assert columns == {"prompt": "Say: ", "answer": 7, "other": 1}
        return "", 1, True

    say(monkeypatch, turns("5\n"))
    assert Environment(anything, "any").play(policy, tokenizer, [x])["rewards"].tolist() == [1]
    with pytest.raises(ValueError, match=r"'guess': its step takes \['answer'\], but the row has \['prompt'\]"):
        Environment(games.guessing_step, "guess").play(policy, tokenizer, ["Say: "])


def test_steps_run_at_the_same_time_and_may_be_async(policy, tokenizer, monkeypatch):
    def together(messages):
        begun.append(messages)
        while len(begun) < 12:
            time.sleep(0.001)
        return None, np.float32(2), True

    async def later(messages):
        begun.append(messages)
        while len(begun) < 12:
            await asyncio.sleep(0.001)
        return None, 2, np.True_

    say(monkeypatch, lambda _: f"5{END}")
    for step in (together, later):
        begun = []
        batch = Environment(step, "slow").play(policy, tokenizer, [CHAT], n=12)
        assert batch["rewards"].tolist() == [2] * 12


def forever(messages):
    time.sleep(30)


FAULTS = {
    "raised KeyError: 'x' (test_environments.py, line": lambda messages: {}["x"],
    "took longer than timeout=0.2 seconds": forever,
    "returned 3, but must return (observation, reward, done)": lambda messages: 3,
    "returned ('a', 1), but must return": lambda messages: ("a", 1),
    "returned reward=nan, which must be a finite number": lambda messages: ("a", float("nan"), True),
    "returned reward='1', which": lambda messages: ("a", "1", False),
    "returned done=1, which must be True or False": lambda messages: ("a", 1, 1),
    "returned observation=None, which must be a string": lambda messages: (None, 1, False),
    "returned observation=[], which": lambda messages: ([], 1, False),
    "returned observation=['a'], which": lambda messages: (["a"], 1, False),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_step_with_a_fault_stops_with_the_conversation(policy, tokenizer, monkeypatch, reason):
    say(monkeypatch, lambda text: "five\n" if "Two" in text else "one\n")
    step = lambda m: FAULTS[reason](m) if "Two" in m[0]["content"] else ("", 0, True)  # noqa: E731
    env = Environment(step, "mine", timeout=0.2 if "longer" in reason else 60)
    told = re.escape(f"environment='mine': its step {reason}") + r"(.|\n)*user: Two\n  assistant: five"
    with pytest.raises(ValueError, match=told):
        env.play(policy, tokenizer, ["One", "Two"])


def test_a_step_may_end_the_program(policy, tokenizer):
    with pytest.raises(SystemExit):
        Environment(lambda messages: sys.exit(), "exit").play(policy, tokenizer, [CHAT])


def test_limits_out_of_range_are_refused(policy, tokenizer):
    for options, reason in [({"turns": 0}, "turns=0"), ({"timeout": 0}, "timeout=0")]:
        with pytest.raises(ValueError, match=reason):
            Environment(echo, "echo", **options)
    with pytest.raises(ValueError, match="must be a function of the messages"):
        Environment(lambda: None, "echo")
    for prompts, n in [([], 1), (["a"], 0)]:
        with pytest.raises(ValueError, match=f"prompts has {len(prompts)} rows and n={n}"):
            ECHO.play(policy, tokenizer, prompts, n=n)


# the games


@pytest.mark.parametrize("game", ["guessing", "calculator"])
def test_the_episodes_of_a_game_are_played_to_the_same_tokens(policy, tokenizer, monkeypatch, game):
    rows = getattr(games, game)(6, seed=3)
    texts = {
        tokenizer.decode(encode(tokenizer, x["messages"][:i])): x["messages"][i]["content"] + END
        for x in rows
        for i in range(1, len(x["messages"]), 2)
    }
    say(monkeypatch, texts.__getitem__)
    batch = Environment(games.STEPS[f"builtin:{game}"], game).play(policy, tokenizer, rows)
    assert batch["rewards"].tolist() == [1] * 6
    assert not batch["truncated"].any()
    assert batch["turns"].tolist() == [len(x["messages"]) // 2 for x in rows]
    (tuned,) = hf.text([{"messages": rows[0]["messages"]}], tokenizer, max_length=512)
    x = row(batch, 0)
    assert x["ids"] == tuned["ids"][: len(x["ids"])]


def test_guessing():
    step = lambda text: games.guessing_step([{"role": "assistant", "content": text}], answer=7)  # noqa: E731
    assert step("5") == ("higher", 0, False)
    assert step("not 7 but 8") == ("lower", 0, False)
    assert step("It is 7.")[1:] == (1, True)
    assert step("seven") == ("Say a number.", 0, False)
    assert step("9" * 5000)[0] == "lower"
    rows = games.guessing(200, highest=5)
    assert {x["answer"] for x in rows} == set(range(1, 6))
    assert max(len(x["messages"]) for x in rows) == 6  # three guesses are enough for five numbers


def test_calculator():
    step = lambda text: games.calculator_step([{"role": "assistant", "content": text}], answer=3149)  # noqa: E731
    assert step("Let me see: calc(37*85+4)!") == ("3149", 0, False)
    assert step("calc(2*(3+4))") == ("14", 0, False)
    assert step("So answer: 3,149")[1:] == (1, True)
    assert step("answer: 3 or answer: 3149.0")[1:] == (1, True)
    assert step("answer: -3149")[1:] == (0, True)
    assert step("answer: 3149.01")[1:] == (0, True)
    assert step("hm")[0].startswith("Say calc(")
    assert step("calc(1/0)")[0] == "error: division by zero"


CALCULATIONS = {"37*85": "3145", "7/2": "3.5", "1/3": "0.3333333333", "-(2 - 5) % 2": "1", "7//2": "3", "+.5": "0.5"}


@pytest.mark.parametrize("expression", CALCULATIONS)
def test_calculations(expression):
    assert games.calculate(expression) == CALCULATIONS[expression]


NOT_NUMBERS = [
    "9**9**9",
    "__import__('os')",
    "1or 2",
    "a",
    "",
    "1,2",
    "...",
    "(1",
    "1/0",
    "9" * 201,
]


@pytest.mark.parametrize("expression", [*NOT_NUMBERS, "-" * 199, "(" * 120, "1 2", "007", "()", "3(4)"])
def test_anything_but_arithmetic_is_refused(expression):
    with pytest.raises((ArithmeticError, SyntaxError, ValueError)):
        games.calculate(expression)


@pytest.mark.parametrize("load", [games.load_guessing, games.load_calculator])
def test_games_are_datasets(load):
    train, test = load("train"), load("test")
    assert len(train) == 4096
    assert len(test) == 512
    assert train[:9] != test[:9]
    assert train[:9] == load("train")[:9]
    with pytest.raises(ValueError, match=r"split='dev' of builtin:\w+ must be one of \['test', 'train'\]"):
        load("dev")
