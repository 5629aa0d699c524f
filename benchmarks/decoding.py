"""Ways to decode with one model: alignkit's loop, its parts replaced, and transformers' `generate` with its caches."""

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.run import Options
from benchmarks.workloads import WORKLOADS, Shape, changed, save_model, save_tokenizer

COLUMNS = {"side": "way", "step_s": "s", "range": "min to max", "tokens_per_s": "tokens/s", "time_ratio": "time x"}


def decoding(options: Options, given: dict[str, Any]) -> None:
    """Sample GRPO's answers `repeats` times in each way, in turn, after one that is not counted."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignkit import hf
    from alignkit.hf import sampling
    from alignkit.sampling import Sampling

    torch.set_num_threads(options.threads)
    workload = changed(WORKLOADS["grpo-128"], **given)
    shape, device = workload.shape, options.device
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as name:
        save_model(workload, Path(name), options.seed)
        save_tokenizer(shape.vocab, Path(name))
        policy, tokenizer = hf.causal_lm(name, sampling=Sampling(max_new=shape.completion))
        lm, compiled = (AutoModelForCausalLM.from_pretrained(name).to(device) for _ in range(2))
    policy.to(device)
    draw = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(2, shape.vocab, (1, shape.prompt), generator=draw).tolist()
    ids = torch.tensor(prompt, device=device).repeat_interleave(shape.group, 0)

    def loop(policy: Any) -> None:
        hf.sample(policy, tokenizer, prompt, n=shape.group)

    def growing() -> None:
        layer, sampling._Layer = sampling._Layer, sampling.DynamicLayer
        try:
            loop(policy)
        finally:
            sampling._Layer = layer

    def generate(lm: Any, **cache: Any) -> None:
        length = {"max_new_tokens": shape.completion, "min_new_tokens": shape.completion}
        options = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            lm.generate(input_ids=ids, **length, **options, **cache)

    compiled.forward = torch.compile(compiled.forward, dynamic=False)
    ways = {
        "alignkit": partial(loop, policy),
        "alignkit, keys and values copied at each token": growing,
        "generate, dynamic cache": partial(generate, lm),
        "generate, static cache": partial(generate, lm, cache_implementation="static"),
        "generate, static cache, compiled": partial(generate, compiled, cache_implementation="static"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    _write(times, shape, options)


def _write(times: dict[str, list[float]], shape: Shape, options: Options) -> None:
    records = [
        {"side": name, "step_s": median(x[1:]), "step_min_s": min(x[1:]), "step_max_s": max(x[1:]), "first_s": x[0]}
        for name, x in times.items()
    ]
    for record in records:
        record["time_ratio"] = record["step_s"] / records[0]["step_s"]
        record["tokens_per_s"] = shape.group * shape.completion / record["step_s"]
    note = (
        f"{shape.group} answers of {shape.completion} tokens to a prompt of {shape.prompt}, vocabulary {shape.vocab}, "
        f"{options.device}, {options.threads} threads, medians of {options.repeats} after one that compiles"
    )
    report.write("decoding", records, columns=COLUMNS, note=note)
