"""Datasets in the formats people have, to rows of token ids and masks.

A dataset is a hub id, a .jsonl, .json, .parquet or .csv file, or `builtin:reviews`. Rows are

    text         a string, or a list of messages
    messages     [{"role": ..., "content": ...}, ...]; the assistant's turns count
    prompt, completion         strings or lists of messages; the completion counts
    prompt, chosen, rejected   strings or lists of messages; answers that both begin with the prompt lose it, and
                               without a prompt it is what both begin with

Messages go through the tokenizer's chat template. A beginning-of-sequence token stands at the front, once, if the
tokenizer uses one; an end-of-sequence token stands at the end, once, and counts.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from alignkit import data
from alignkit.hf.files import bars_in_terminals_only, load
from alignkit.hf.processes import process
from alignkit.types import Batch, Rows

TEXT_FORMATS = (("messages",), ("prompt", "completion"), ("text",))
PAIR_FORMATS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))

_Source = str | Path | Sequence[dict[str, Any]]


class _Row(NamedTuple):
    ids: list[int]
    mask: list[bool]
    rewritten: int = 0
    text: bool = False


def text(dataset: _Source, tokenizer: Any, *, max_length: int, keep: str = "keep_end", split: str = "train") -> Dataset:
    """Rows to imitate: `ids` [T] and `mask` [T], True on what counts; prints how many were cut or dropped."""

    def rows(row: Mapping[str, Any], names: Sequence[str]) -> list[_Row]:
        if names == ("text",) and isinstance(row["text"], str):
            return [_finish(tokenizer, encode(tokenizer, row["text"]), start=0)._replace(text=True)]
        if names == ("prompt", "completion"):
            return [encode_answer(tokenizer, row["prompt"], row["completion"])]
        return [_conversation(tokenizer, row[names[0]])]

    return _tokenize(dataset, split, tokenizer, rows, TEXT_FORMATS, max_length, keep)


def pairs(
    dataset: _Source, tokenizer: Any, *, max_length: int, keep: str = "keep_end", split: str = "train"
) -> Dataset:
    """Preference pairs: `ids` [2, T] and `mask` [2, T], chosen then rejected, True on the answers.

    Both begin with the same prompt tokens: where the prompt's last tokens merge with an answer's first, the merged
    token belongs to the answer. Prints how many pairs were cut or dropped.
    """

    def rows(row: Mapping[str, Any], names: Sequence[str]) -> list[_Row]:
        prompt, chosen, rejected = _explicit(row.get("prompt"), row["chosen"], row["rejected"])
        both = [encode_answer(tokenizer, prompt, answer) for answer in (chosen, rejected)]
        start = min(answer.mask.index(True) for answer in both)
        return [
            x._replace(mask=[t >= start and (m or True not in x.mask[:t]) for t, m in enumerate(x.mask)]) for x in both
        ]

    return _tokenize(dataset, split, tokenizer, rows, PAIR_FORMATS, max_length, keep)


def prompts(dataset: str | Path, *, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a dataset whose column `prompt` holds strings or lists of messages; rewards read the others.

    Raises ValueError for a row whose prompt is neither or empty.
    """
    table = load(dataset, split=split)
    if "prompt" not in table.column_names:
        raise ValueError(f"{dataset}: no column 'prompt', only {table.column_names}")
    rows: list[dict[str, Any]] = table.to_list()
    for number, row in enumerate(rows, 1):
        if not (prompt := row["prompt"]) or not isinstance(prompt, str | list):
            raise ValueError(f"{dataset}: row {number}: prompt={prompt!r} must be a string or a list of messages")
    return rows


def stream(rows: Rows, *, batch: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """`data.stream` with this process's share of every batch; the shares have about as many tokens."""
    state = process()
    if batch < 1 or batch % state.num_processes:
        raise ValueError(f"batch={batch} must be a positive multiple of the {state.num_processes} processes")
    for whole in data.shuffled(rows, batch=batch, seed=seed, start=start):
        shares = data.deal([_tokens(row) for row in whole], state.num_processes)
        yield data.collate([whole[i] for i in shares[state.process_index]])


def _tokens(row: Mapping[str, Any]) -> int:
    ids = row.get("ids", ())
    return sum(map(len, ids)) if len(ids) and isinstance(ids[0], Sequence) else len(ids)


def shuffled(rows: Rows, *, batch: int, seed: int, start: int = 0) -> Iterator[list[Any]]:
    """`data.shuffled` with this process's share of every list, e.g. of prompts."""
    state = process()
    return data.shuffled(rows, batch=batch, seed=seed, start=start, rank=state.process_index, world=state.num_processes)


def encode(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a string, or of messages and the header of the assistant's turn; with a BOS if one is used.

    Of a row they are those of its column `prompt`; token ids are left as they are.
    """
    prompt = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    if isinstance(prompt, list) and all(isinstance(x, int) for x in prompt):
        return prompt
    string = prompt if isinstance(prompt, str) else _render(tokenizer, prompt, True)
    return _with_bos(tokenizer, _ids(tokenizer, string))


def encode_answer(tokenizer: Any, prompt: Any, answer: Any) -> _Row:
    """Prompt and answer encoded together; the answer's tokens count, from the first that is not only prompt."""
    if isinstance(prompt, str) and isinstance(answer, str):
        ids = _with_bos(tokenizer, _ids(tokenizer, prompt + answer))
        return _finish(tokenizer, ids, start=_shared(encode(tokenizer, prompt), ids))
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return _conversation(tokenizer, prompt + answer, first=len(prompt))


def _conversation(tokenizer: Any, messages: list[dict[str, str]], first: int = 0) -> _Row:
    """The whole conversation; the assistant's turns from message `first` on count.

    Some templates write a turn differently once another follows (Qwen 3 drops its thoughts): such turns do not count,
    as the model will never see them begin like this.
    """
    whole = _render(tokenizer, messages, False)
    ids = _with_bos(tokenizer, _ids(tokenizer, whole))
    mask, rewritten = [False] * len(ids), 0
    turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no turn of the assistant to learn from")
    for i in turns:
        before = _render(tokenizer, messages[:i], True) if i else whole[: whole.index(messages[0]["content"])]
        after = _render(tokenizer, messages[: i + 1], False)
        if not whole.startswith(before) or not whole.startswith(after):
            rewritten += 1
            continue
        start, end = (_shared(_with_bos(tokenizer, _ids(tokenizer, x)), ids) for x in (before, after))
        mask[start:end] = [True] * (end - start)
        eos = [t for t in range(start, end) if ids[t] == tokenizer.eos_token_id]
        if eos:  # what a template writes after it, such as a newline, is not the answer's
            mask[eos[-1] + 1 : end] = [False] * (end - eos[-1] - 1)
    if True not in mask:
        raise ValueError("the chat template writes the conversation differently once its last turn is there")
    last = len(mask) - mask[::-1].index(True)
    ids, mask = ids[:last], mask[:last]
    if ids[-1] != tokenizer.eos_token_id:
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    return _Row(ids, mask, rewritten)


def _finish(tokenizer: Any, ids: list[int], *, start: int) -> _Row:
    """End with one EOS; tokens from `start` on count, but not a BOS."""
    if ids[-1:] != [tokenizer.eos_token_id] or len(ids) <= start:
        ids = [*ids, tokenizer.eos_token_id]
    start = max(start, len(_with_bos(tokenizer, [])))
    return _Row(ids, [t >= start for t in range(len(ids))])


def _explicit(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), the prompt taken out of the answers where they begin with it."""
    if type(chosen) is not type(rejected):
        raise ValueError(f"chosen is a {type(chosen).__name__}, rejected a {type(rejected).__name__}")
    n = _shared(chosen, rejected)
    if isinstance(chosen, str):
        if prompt is not None:
            repeated = isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt)
            n = len(prompt) if repeated else 0
            return prompt, chosen[n:], rejected[n:]
        n = next((i for i in range(n, 0, -1) if chosen[i - 1].isspace()), 0)  # not in the middle of a word
        n = len(chosen[:n].rstrip(" "))  # a space belongs to the word after it
        return chosen[:n], chosen[n:], rejected[n:]
    if prompt is not None and chosen[0]["role"] == "assistant":
        return prompt, chosen, rejected
    n = min(n, len(chosen) - 1, len(rejected) - 1)  # the answers are not empty
    if not n:
        raise ValueError("chosen and rejected do not begin with the same messages, so there is no prompt")
    first = prompt if isinstance(prompt, list) and chosen[: len(prompt)] != prompt else []  # e.g. a system prompt
    return [*first, *chosen[:n]], chosen[n:], rejected[n:]


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _ids(tokenizer: Any, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]


def _with_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    uses_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return [bos, *ids] if uses_bos and ids[:1] != [bos] else ids


def _render(tokenizer: Any, messages: list[dict[str, str]], open_turn: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)


def _tokenize(
    dataset: Any,
    split: str,
    tokenizer: Any,
    to_rows: Callable[[Mapping[str, Any], Sequence[str]], list[_Row]],
    formats: Sequence[Sequence[str]],
    max_length: int,
    keep: str,
) -> Dataset:
    """Rows of the first format whose columns are there; one row of lists if the format has one text, else of pairs."""
    name = str(dataset) if isinstance(dataset, str | Path) else "the given rows"
    table = load(dataset, split=split) if isinstance(dataset, str | Path) else Dataset.from_list(list(dataset))
    names = next((f for f in formats if set(f) <= set(table.column_names)), None)
    if names is None:
        known = "; or ".join(", ".join(f) for f in formats)
        raise ValueError(f"{name}: the columns are {table.column_names}, but must include {known}")
    if not len(table):
        raise ValueError(f"{name} has no rows")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token, so answers could never end: set tokenizer.eos_token")

    def convert(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        where = f"{name}, row {index + 1}"
        values = {x: _check(tokenizer, row[x], f"{where}: {x!r}", string=x != "messages") for x in names}
        try:
            full = to_rows(values, names)
        except Exception as error:  # a chat template may raise anything
            raise ValueError(f"{where}: {error}") from error
        overflow = max(0, *(len(x.ids) - max_length for x in full))
        limits = {"max_length": max_length, "keep": keep, "bos": tokenizer.bos_token_id, "overflow": overflow}
        cut = [data.truncate(x.ids, x.mask, **limits, text=x.text) for x in full]
        ids, mask = [x.ids for x in cut], [x.mask for x in cut]
        return {
            "ids": ids if formats is PAIR_FORMATS else ids[0],
            "mask": mask if formats is PAIR_FORMATS else mask[0],
            "cut": overflow > 0,
            "short": any(x.lost > 0 for x in cut),
            "rewritten": sum(x.rewritten for x in full),
            "usable": all(any(m) for m in mask),
            "tokens": max(len(x.ids) for x in full),
        }

    bars_in_terminals_only()
    with process().main_process_first():
        rows = table.map(
            convert,
            with_indices=True,
            remove_columns=table.column_names,
            desc=f"tokenizing {name}",
            new_fingerprint=_fingerprint(table, tokenizer, names, max_length, keep),
        )
    unused = [] if name.startswith("builtin:") else [x for x in table.column_names if x not in names]
    return _report(rows, name, max_length, keep, unused)


def _fingerprint(table: Dataset, tokenizer: Any, *options: Any) -> str:
    """A key for the cache of datasets; its own would pickle everything that the conversion can reach."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [table._fingerprint, repr(tokenizer), backend and backend.to_str(), tokenizer.chat_template, *options]
    code = [Path(x.__file__).read_text() for x in (data, sys.modules[__name__])]
    return hashlib.sha256(repr([*parts, *code]).encode()).hexdigest()[:32]


def _report(rows: Dataset, name: str, max_length: int, keep: str, unused: Sequence[str]) -> Dataset:
    """Print what was cut and dropped; refuse a dataset of which nothing fits."""
    total, cut, short = len(rows), sum(rows["cut"]), sum(rows["short"])
    if cut == total:
        raise ValueError(
            f"{name}: all {total} rows are longer than max_length={max_length} tokens (the shortest has "
            f"{min(rows['tokens'])}); raise max_length, or shorten the rows yourself"
        )
    kept = rows.select([i for i, usable in enumerate(rows["usable"]) if usable])
    notes = [f"{total:,} rows"]
    if cut:
        notes.append(f"{cut:,} cut to {max_length} tokens ({keep}), {short:,} of them lost tokens that count")
    if sum(rows["rewritten"]):
        notes.append(f"{sum(rows['rewritten']):,} turns do not count, as the chat template rewrites them")
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    if len(kept) < total:
        notes.append(f"{total - len(kept):,} dropped, as no token of them counts")
    if process().is_main_process:
        print(f"{name}: " + "; ".join(notes))
    if not len(kept):
        raise ValueError(f"{name}: in none of the {total} rows is there a token that counts")
    return kept.select_columns(["ids", "mask"])


def _check(tokenizer: Any, value: Any, where: str, *, string: bool) -> Any:
    """A string if it may be one, or a list of messages; ValueError otherwise."""
    if string and isinstance(value, str):
        return value
    messages = isinstance(value, list) and bool(value) and all(isinstance(m, dict) and m.get("role") for m in value)
    if not messages:
        kinds = "a string or a list of messages" if string else "a list of messages"
        raise ValueError(f"{where} is {value!r:.80}, but must be {kinds} with role and content")
    if not all(isinstance(m.get("content"), str) for m in value):
        raise ValueError(f"{where} has a message whose content is not a string: {value!r:.120}")
    if not tokenizer.chat_template:
        raise ValueError(f"{where} is a conversation, but the tokenizer has no chat template: set its chat_template")
    return [{key: x for key, x in message.items() if x is not None} for message in value]
