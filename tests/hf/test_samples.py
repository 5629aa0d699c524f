"""Samples in the terminal and in `samples.parquet`: what is read, when, and what a resumed run does to the file."""

import sys
from types import SimpleNamespace

import pandas
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tqdm.auto import tqdm

from alignkit import data, hf
from alignkit.hf.samples import SAMPLES, Samples
from alignkit.losses.policy import reinforce
from alignkit.train import rollouts
from alignkit.weights import token_mean, weigh

CHAT = [{"role": "user", "content": "What is [red]2 + 3[/red]?"}]


def answered(tokenizer, *pairs, **columns):
    """A rollout of (prompt, answer) pairs."""
    rows = []
    for prompt, answer in pairs:
        prompt, answer = hf.data.encode(tokenizer, prompt), [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append({"ids": prompt + answer, "mask": [False] * len(prompt) + [True] * len(answer)})
    return data.collate(rows) | columns


def watch(out, tokenizer, rollout, step=1, of=1, state=None, main=True, first=False, **options):
    """What one step's end does."""
    at = SimpleNamespace(is_world_process_zero=main, global_step=step, max_steps=of)
    args = SimpleNamespace(output_dir=str(out), logging_first_step=first)
    state = {} if state is None else state
    Samples(tokenizer, state | {"rollout": rollout}, **options).on_step_end(args, at, None)


def begin(out, step, main=True):
    at = SimpleNamespace(is_world_process_zero=main, global_step=step, max_steps=9)
    Samples(None, {}).on_train_begin(SimpleNamespace(output_dir=str(out)), at, None)


def read(out):
    return pandas.read_parquet(out / SAMPLES)


class TestFile:
    def test_prompts_and_answers_are_text_without_special_tokens(self, tokenizer, tmp_path):
        rollout = answered(tokenizer, (CHAT, " It is 5."), ("Film:", " 漢字\n"))
        watch(tmp_path, tokenizer, rollout)
        table = read(tmp_path)
        assert table["prompt"][0].split() == ["user", "What", "is", "[red]2", "+", "3[/red]?", "assistant"]
        assert table["prompt"][0].endswith("assistant\n")
        assert table["prompt"][1] == "Film:"
        assert (
            table["answer"].tolist()
            == [" It is 5.", " 漢字\n"]
            == hf.decode(tokenizer, rollout["ids"], rollout["mask"])
        )
        assert table["length"].tolist() == rollout["mask"].sum(-1).tolist()
        assert table["step"].tolist() == [1, 1]
        assert table["row"].tolist() == [0, 1]

    def test_roles_stay_apart_where_only_special_tokens_part_them(self, tokenizer, tmp_path):
        start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        ids = [start, *tokenizer("user")["input_ids"], start, *tokenizer("Hello")["input_ids"], start, 9]
        watch(tmp_path, tokenizer, data.collate([{"ids": ids, "mask": [False] * (len(ids) - 1) + [True]}]))
        assert read(tmp_path)["prompt"].tolist() == ["user\nHello"]

    def test_special_tokens_that_have_no_role_are_left_out_too(self, tokenizer, tmp_path):
        """As Llama 3 has them: special, but not among the tokenizer's named ones."""
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.add_special_tokens([AddedToken("<|header|>", special=True)])
        other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)
        header = backend.token_to_id("<|header|>")
        assert header not in other.all_special_ids
        ids = [*other("user")["input_ids"], header, *other("Hello")["input_ids"], other.eos_token_id]
        watch(tmp_path, other, data.collate([{"ids": ids, "mask": [False] * (len(ids) - 1) + [True]}]))
        assert read(tmp_path)["prompt"].tolist() == ["user\nHello"]

    def test_an_answer_of_several_turns_shows_what_stands_between(self, tokenizer, tmp_path):
        a, b, c, d = (tokenizer(x)["input_ids"] for x in ("Ask:", " add(2, 3)", " [5]", " Five."))
        mask = [False] * len(a) + [True] * len(b) + [False] * len(c) + [True] * len(d)
        watch(tmp_path, tokenizer, data.collate([{"ids": a + b + c + d, "mask": mask}]))
        (row,) = read(tmp_path).to_dict("records")
        assert row["prompt"] == "Ask:"
        assert row["answer"] == " add(2, 3) [5] Five."
        assert row["length"] == len(b) + len(d)

    def test_padding_is_not_read_though_its_id_may_be_a_word(self, tmp_path):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"!": 0, "Film": 1, "good": 2, "<end>": 3}, unk_token="!"))
        words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
        ids = torch.tensor([[1, 0, 2, 0, 3], [1, 0, 2, 0, 0], [1, 2, 0, 0, 0], [0, 0, 0, 0, 0]])
        mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
        watch(tmp_path, words, {"ids": ids, "mask": mask})
        table = read(tmp_path)
        assert table["prompt"].tolist() == ["Film !", "Film !", "Film good", ""]
        assert table["answer"].tolist() == ["good !", "good", "", ""]
        assert table["length"].tolist() == [3, 1, 0, 0]

    def test_numbers_per_row_are_there_and_per_token_are_not(self, tokenizer, tmp_path):
        rollout = answered(tokenizer, ("a", "b c d"), ("a", "c"))
        time = rollout["ids"].shape[-1]
        wide = torch.where(rollout["mask"], rollout["mask"].cumsum(-1), torch.nan)
        rollout |= {
            "rewards": torch.tensor([1, -0.5], dtype=torch.bfloat16),
            "truncated": torch.tensor([True, False]),
            "turns": torch.tensor([3, 1]),
            "baseline": torch.tensor([[0.5], [0.25]]),
            "entropy": torch.rand(2, time),
            "coef": torch.tensor(0.1),
            "advantages": wide,
        }
        watch(tmp_path, tokenizer, rollout)
        table = read(tmp_path)
        own = ["step", "row", "prompt", "answer", "length"]
        assert list(table) == [*own, "rewards", "truncated", "turns", "baseline", "advantages"]
        assert table["rewards"].tolist() == [1, -0.5]
        assert table["truncated"].tolist() == [True, False]
        assert table["turns"].tolist() == [3, 1]
        assert table["baseline"].tolist() == [0.5, 0.25]
        assert table["advantages"].tolist() == pytest.approx([(n + 1) / 2 for n in table["length"]])

    def test_pairs_are_two_answers_of_a_row(self, tokenizer, tmp_path):
        four = answered(tokenizer, *(("Film:", x) for x in (" good", " bad", " warm", " cold")))
        rollout = {name: x.unflatten(0, (2, 2)) for name, x in four.items()}
        rollout |= {"rewards": torch.tensor([[1.0, 0], [3, 2]]), "margin": torch.tensor([0.5, 0.25])}
        rollout["advantages"] = torch.arange(4.0).view(2, 2, 1).expand(rollout["ids"].shape)
        watch(tmp_path, tokenizer, rollout)
        table = read(tmp_path)
        assert table["row"].tolist() == [0, 0, 1, 1]
        assert table["answer"].tolist() == [" good", " bad", " warm", " cold"]
        assert table["rewards"].tolist() == [1, 0, 3, 2]
        assert table["advantages"].tolist() == [0, 1, 2, 3]
        assert table["margin"].tolist() == [0.5, 0.5, 0.25, 0.25]

    def test_a_column_that_comes_later_is_empty_before(self, tokenizer, tmp_path):
        rollout = answered(tokenizer, ("a", "b"))
        watch(tmp_path, tokenizer, rollout | {"rewards": torch.tensor([1])}, step=1)
        watch(tmp_path, tokenizer, rollout | {"rewards": torch.tensor([0.5]), "turns": torch.tensor([3])}, step=2, of=2)
        table = read(tmp_path)
        assert table["rewards"].tolist() == [1, 0.5]
        assert table["turns"].isna().tolist() == [True, False]

    @pytest.mark.parametrize("name", ["step", "length"])
    def test_a_name_is_not_taken_twice(self, tokenizer, tmp_path, name):
        with pytest.raises(
            ValueError, match=f"the rollout's column '{name}' has the name of a column of samples.parquet"
        ):
            watch(tmp_path, tokenizer, answered(tokenizer, ("a", "b")) | {name: torch.tensor([1])})

    def test_a_write_that_fails_leaves_what_was_there(self, tokenizer, tmp_path, monkeypatch):
        rollout = answered(tokenizer, ("a", "b"))
        watch(tmp_path, tokenizer, rollout)
        before = (tmp_path / SAMPLES).read_bytes()

        def half(table, where, **_):
            where.write_bytes(before[:20])
            raise OSError("No space left on device")

        monkeypatch.setattr(parquet, "write_table", half)
        with pytest.raises(OSError, match="No space"):
            watch(tmp_path, tokenizer, rollout, step=2, of=2)
        assert (tmp_path / SAMPLES).read_bytes() == before

    @pytest.mark.parametrize("content", [b"not a table", "foreign"])
    def test_a_file_that_is_something_else_is_refused_and_kept(self, tokenizer, tmp_path, content):
        file = tmp_path / SAMPLES
        if content == "foreign":
            parquet.write_table(pyarrow.table({"step": [1], "text": ["a"]}), file)
        else:
            file.write_bytes(content)
        before = file.read_bytes()
        problem = "lacks the columns" if content == "foreign" else "arquet"
        with pytest.raises(ValueError, match=rf"samples.parquet is no table of samples: .*{problem}.*\. Move it away"):
            watch(tmp_path, tokenizer, answered(tokenizer, ("a", "b")))
        with pytest.raises(ValueError, match="is no table of samples"):
            begin(tmp_path, step=3)
        assert file.read_bytes() == before

    def test_the_samples_of_another_run_are_refused(self, tokenizer, tmp_path):
        begin(tmp_path, step=0)
        watch(tmp_path, tokenizer, answered(tokenizer, ("a", "b")))
        before = (tmp_path / SAMPLES).read_bytes()
        with pytest.raises(ValueError, match=r"samples\.parquet is there already, but this run begins: move it away"):
            begin(tmp_path, step=0)
        begin(tmp_path, step=0, main=False)
        begin(tmp_path, step=1)
        assert read(tmp_path)["step"].tolist() == [1]
        assert len(before) == len((tmp_path / SAMPLES).read_bytes())


class TestTimes:
    def steps(self, tokenizer, out, total, state=None, every=None, first=False, rollout=None):
        state = {} if state is None else state
        samples = Samples(tokenizer, state, every=every, rows=0)
        args = SimpleNamespace(output_dir=str(out), logging_first_step=first)
        for step in range(1, total + 1):
            state["rollout"] = rollout or answered(tokenizer, ("a", "b"))
            at = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=total)
            samples.on_step_end(args, at, None)
        return sorted(set(read(out)["step"])) if (out / SAMPLES).exists() else []

    @pytest.mark.parametrize(
        ("total", "options", "expected"),
        [
            (7, {"every": 3}, [3, 6, 7]),
            (6, {"every": 3}, [3, 6]),
            (3, {"every": 9}, [3]),
            (3, {"every": 9, "first": True}, [1, 3]),
            (2, {"every": 1}, [1, 2]),
            (10, {}, [2, 4, 6, 8, 10]),
            (12, {}, [3, 6, 9, 12]),
            (3, {}, [1, 2, 3]),
            (3, {"every": 0, "first": True}, []),
        ],
    )
    def test_every_so_many_steps_and_the_last(self, tokenizer, tmp_path, total, options, expected):
        assert self.steps(tokenizer, tmp_path, total, **options) == expected

    def test_a_rollout_of_several_steps_is_written_once(self, tokenizer, tmp_path):
        rollout = answered(tokenizer, ("a", "b"))
        assert self.steps(tokenizer, tmp_path, 3, every=1, rollout=rollout) == [1]

    def test_only_the_main_process_writes(self, tokenizer, tmp_path, capsys):
        watch(tmp_path, tokenizer, answered(tokenizer, ("a", "b")), main=False)
        assert not list(tmp_path.iterdir())
        assert not capsys.readouterr().out

    def test_a_stream_without_rollouts_has_no_samples(self, tmp_path):
        at = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=1)
        Samples(None, {}).on_step_end(SimpleNamespace(output_dir=str(tmp_path), logging_first_step=False), at, None)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("options", [{"every": -1}, {"rows": -1}])
    def test_numbers_below_0_are_refused(self, options):
        with pytest.raises(ValueError, match=r"=-1 .*must each be at least 1"):
            Samples(None, {}, **options)


class TestRuns:
    def run(self, out, every=1, **fields):
        """Six steps, two to a rollout, a checkpoint after the third."""
        policy, tokenizer = hf.causal_lm("builtin:tiny")
        state = {}

        def collect(i):
            pairs = [("Film:", f" {i} {j}") for j in range(4)]
            return answered(tokenizer, *pairs, rewards=torch.arange(4.0) + i)

        def batches(step):
            return rollouts(collect, state, size=2, seed=0, start=step)

        def loss_fn(policy, ids, mask, rewards, weights):
            return weigh(reinforce(policy(ids, mask), rewards[:, None].expand(ids.shape)), weights), {}

        args = hf.arguments(
            str(out), batch=2, micro=2, lr=1e-3, steps=6, seed=0, save_steps=3, logging_steps=2, **fields
        )
        watcher = Samples(tokenizer, state, every=every)
        hf.fit(loss_fn, policy, batches, aggregate=token_mean, args=args, state=state, callbacks=[watcher])

    def test_a_resumed_run_ends_with_the_file_of_the_whole_one(self, tmp_path, capsys):
        self.run(tmp_path)
        whole = read(tmp_path)
        assert whole["step"].tolist() == [1] * 4 + [3] * 4 + [5] * 4
        assert whole["rewards"].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5]
        assert capsys.readouterr().out.count("4 answers") == 3
        self.run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # in the midst of the second rollout
        pandas.testing.assert_frame_equal(read(tmp_path), whole)
        out = capsys.readouterr().out
        assert "step 5/6, 4 answers" in out
        assert out.count("4 answers") == 1

    def test_rows_after_the_checkpoint_go_even_if_no_more_are_wanted(self, tmp_path):
        self.run(tmp_path)
        self.run(tmp_path, every=0, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert read(tmp_path)["step"].tolist() == [1] * 4 + [3] * 4


class TestTerminal:
    def shown(self, tokenizer, tmp_path, capsys, rollout, **options):
        watch(tmp_path, tokenizer, rollout, **options)
        return capsys.readouterr().out

    def test_a_table(self, tokenizer, tmp_path, capsys):
        rollout = answered(
            tokenizer,
            (CHAT, " It is\x1b[31m \\boxed{5}\x1b[0m."),
            (CHAT, " [bold]Six[/bold] :smile:"),
            ("Film:", " dull"),
            rewards=torch.tensor([1, -1 / 3, 0]),
            advantages=torch.tensor([[0.5], [-0.5], [0]]),
            truncated=torch.tensor([False, True, False]),
            tries=torch.tensor([12345, 1, 1]),
        )
        out = self.shown(tokenizer, tmp_path, capsys, rollout, rows=2)
        assert "\x1b" not in out
        title, *lines = [line.rstrip() for line in out.splitlines()]
        assert title == "step 1/1, 3 answers"
        assert {len(line) for line in lines} == {120}
        assert sum(line.startswith("├") for line in lines) == 1
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
        prompt = " ".join(row[0] for row in cells).strip()
        assert prompt == "user What is [red]2 + 3[/red]? assistant"  # once for both of its answers
        assert [row[1] for row in cells if row[1]] == ["It is [31m \\boxed{5} [0m.", "[bold]Six[/bold] :smile:"]
        length = rollout["mask"].sum(-1).tolist()
        assert [row[2] for row in cells if row[2]] == [
            *(f"length {length[0]}", "rewards 1", "advantages 0.5", "tries 12345"),
            *(f"length {length[1]}", "rewards -0.333", "advantages -0.5", "truncated", "tries 1"),
        ]

    def test_the_middle_of_long_texts_is_left_out(self, tokenizer, tmp_path, capsys):
        long = " ".join(str(i) for i in range(300))
        out = self.shown(tokenizer, tmp_path, capsys, answered(tokenizer, (f"begin {long} end", f"first {long} last")))
        assert all(word in out for word in ("begin", "end", "first", "last", "…"))
        assert "150" not in out
        assert len(out.splitlines()) < 12
        assert read(tmp_path)["answer"].tolist() == [f"first {long} last"]

    def test_other_prompts_stand_beside_their_own_answers(self, tokenizer, tmp_path, capsys):
        pairs = [(prompt, " x") for prompt in ("one", "one", "two", "two", "one")]
        out = self.shown(tokenizer, tmp_path, capsys, answered(tokenizer, *pairs), rows=5)
        assert (out.count("one"), out.count("two")) == (2, 1)

    def test_four_answers_are_shown(self, tokenizer, tmp_path, capsys):
        rollout = answered(tokenizer, *(("a", f" {i}") for i in range(6)))
        assert self.shown(tokenizer, tmp_path, capsys, rollout).count("length") == 4
        assert len(read(tmp_path)) == 6

    def test_no_rows_no_table(self, tokenizer, tmp_path, capsys):
        assert not self.shown(tokenizer, tmp_path, capsys, answered(tokenizer, ("a", "b")), rows=0)
        assert len(read(tmp_path)) == 1

    def test_a_terminal_has_its_own_width_and_style(self, tokenizer, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        for name, value in {"COLUMNS": "60", "TERM": "xterm", "FORCE_COLOR": ""}.items():
            monkeypatch.setenv(name, value)
        out = self.shown(tokenizer, tmp_path, capsys, answered(tokenizer, ("a", "b")))
        assert "\x1b[1m" in out
        assert len(out.splitlines()[-1]) == 60

    def test_a_terminal_that_lacks_a_character_shows_another(self, tokenizer, tmp_path, capsysbinary, monkeypatch):
        monkeypatch.setattr(type(sys.stdout), "encoding", "ascii", raising=False)
        watch(tmp_path, tokenizer, answered(tokenizer, ("a", "漢")))
        out = capsysbinary.readouterr().out
        assert out.isascii()
        assert b"? a" in out

    def test_it_stands_above_a_progress_bar(self, tokenizer, tmp_path, capsys):
        with tqdm(total=3, file=sys.stderr) as bar:
            cleared = []
            bar.clear = lambda **_: cleared.append(capsys.readouterr())
            out = self.shown(tokenizer, tmp_path, capsys, answered(tokenizer, ("a", "b")))
        assert len(cleared) == 1
        assert not cleared[0].out
        assert out.startswith("step 1/1")
