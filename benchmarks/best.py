"""The fastest loop for the same maths that we can write around a stock transformers model: what to come close to.

The prompt of a pair or a group is encoded once: a tree of tokens is one packed row, with a mask by which a completion
sees its prompt and itself, and positions that restart after the prompt. The head runs on scored positions alone, in
chunks, and again in the backward pass. Trees are packed into rows no longer than the longest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks import bare
from benchmarks.bare import Scores, Trees
from benchmarks.side import Clock, Job

CHUNK = 1 << 23  # logits at a time


def load(job: Job) -> Callable[[Job, Clock], None]:
    """The loop."""
    return lambda job, clock: bare.run(job, clock, Best())


class Packed(NamedTuple):
    """Rows [R, L]; `ends`: where in the flattened rows each scored token is predicted (or each completion ends)."""

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    ends: Tensor


class Head(torch.autograd.Function):
    """Log-probs of `targets` given hidden states [N, D]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Keeps the logsumexp, not the logits."""
        size = max(CHUNK // len(weight), 1)
        picked, spread = [], []
        for x, t in zip(hidden.split(size), targets.split(size)):
            logits = (x @ weight.T).float()
            picked.append(logits.gather(1, t[:, None])[:, 0])
            peak = logits.amax(1, keepdim=True)
            spread.append(logits.sub_(peak).exp_().sum(1).log_() + peak[:, 0])
        lse = torch.cat(spread)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return torch.cat(picked) - lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """d logits = grad (one-hot - softmax)."""
        hidden, weight, targets, lse = ctx.saved_tensors
        size = max(CHUNK // len(weight), 1)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(hidden), size):
            x, t, g = hidden[i : i + size], targets[i : i + size], grad[i : i + size, None]
            d = (x @ weight.T).float().sub_(lse[i : i + size, None]).exp_().mul_(-g)
            d = d.scatter_add_(1, t[:, None], g).to(x.dtype)
            torch.mm(d, weight, out=d_hidden[i : i + size])
            d_weight.addmm_(d.T, x)
        return d_hidden, d_weight, None


class Reserved(DynamicLayer):
    """The keys and values of a prompt for `n` rows, with room for `new` tokens: nothing is copied to grow it."""

    def __init__(self, layer: Any, n: int, new: int):
        super().__init__()
        self.used, self.is_initialized = layer.keys.shape[-2], True
        held = (torch.nn.functional.pad(x.repeat_interleave(n, 0), (0, 0, 0, new)) for x in (layer.keys, layer.values))
        self.keys, self.values = held

    def update(self, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write the newest token's; all so far."""
        end = self.used + keys.shape[-2]
        self.keys[..., self.used : end, :], self.values[..., self.used : end, :] = keys, values
        self.used = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.used


class Best:
    """What `bare.run` computes with."""

    def logps(self, model: Any, trees: Trees) -> Scores:
        """Of all completions."""
        packed = pack(trees, model.device, last=False)
        answers = [ids for tree in trees for ids in tree["completions"]]
        targets = torch.tensor([token for ids in answers for token in ids], device=model.device)
        lengths = torch.tensor([len(ids) for ids in answers])
        weight = model.get_output_embeddings().weight
        hidden = self._hidden(model, packed)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        logps = Head.apply(hidden.to(dtype), weight.to(dtype), targets)
        return Scores(logps, torch.repeat_interleave(lengths).to(model.device))

    def rewards(self, model: Any, trees: Trees) -> Tensor:
        """The head on the last token of each completion."""
        return model.score(self._hidden(model, pack(trees, model.device, last=True)))[:, 0]

    def sample(self, model: Any, prompts: list[list[int]], n: int, new: int) -> Trees:
        """Each prompt is encoded once; tokens are drawn by inverting the distribution function."""
        body, head, drawn = model.base_model, model.get_output_embeddings(), []
        cache = DynamicCache(config=model.config)
        hidden = body(input_ids=torch.tensor(prompts, device=model.device), past_key_values=cache)[0][:, -1]
        hidden = hidden.repeat_interleave(n, 0)
        cache.layers = [Reserved(layer, n, new) for layer in cache.layers]
        for i in range(new):
            below = head(hidden).float().softmax(-1).cumsum(-1)
            uniform = torch.rand(len(below), 1, device=model.device) * below[:, -1:]
            drawn.append(torch.searchsorted(below, uniform, right=True).clamp_(max=below.shape[1] - 1))
            if i + 1 < new:
                hidden = body(input_ids=drawn[-1], past_key_values=cache, use_cache=True)[0][:, -1]
        rows = torch.cat(drawn, 1).tolist()
        return [{"prompt": prompt, "completions": rows[i * n : (i + 1) * n]} for i, prompt in enumerate(prompts)]

    def _hidden(self, model: Any, packed: Packed) -> Tensor:
        options = {"position_ids": packed.positions, "attention_mask": packed.mask, "use_cache": False}
        return model.base_model(input_ids=packed.ids, **options)[0].flatten(0, 1)[packed.ends]


def pack(trees: Trees, device: Any, *, last: bool) -> Packed:
    """Trees to rows, the longest first into the first row with room; without completions' last tokens unless `last`."""
    drop = 0 if last else 1
    size = [len(t["prompt"]) + sum(len(x) - drop for x in t["completions"]) for t in trees]
    longest, rows, place = max(size), [], {}
    for i in sorted(range(len(trees)), key=lambda i: -size[i]):
        row = next((r for r, used in enumerate(rows) if used + size[i] <= longest), len(rows))
        if row == len(rows):
            rows.append(0)
        place[i] = row * longest + rows[row]
        rows[row] += size[i]
    ids, positions, tree_of, branch = (torch.zeros(len(rows) * longest, dtype=torch.long) for _ in range(4))
    ends = []
    for i, tree in enumerate(trees):
        start, prompt = place[i], tree["prompt"]
        flat, at, own = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k, answer in enumerate(tree["completions"], 1):
            fed = answer[: len(answer) - drop]
            first = start + len(flat)
            places = [start + len(prompt) - 1, *range(first, first + len(fed))]
            ends += [places[-1]] if last else places
            flat += fed
            at += range(len(prompt), len(prompt) + len(fed))
            own += [k] * len(fed)
        stop = start + len(flat)
        ids[start:stop], positions[start:stop] = torch.tensor(flat), torch.tensor(at)
        tree_of[start:stop], branch[start:stop] = i + 1, torch.tensor(own)
    alone = len(rows) == len(trees) and all(len(tree["completions"]) == 1 for tree in trees)
    shaped = [x.view(len(rows), longest).to(device) for x in (ids, positions, tree_of, branch)]
    return Packed(*shaped[:2], None if alone else _visible(*shaped[2:]), torch.tensor(ends, device=device))


def _visible(tree: Tensor, branch: Tensor) -> Tensor:
    """[R, 1, L, L]: a token sees what is before it in its tree, of the prompt or of its own completion."""
    same = (tree[:, :, None] == tree[:, None]) & ((branch[:, None] == 0) | (branch[:, :, None] == branch[:, None]))
    return same.tril()[:, None]
