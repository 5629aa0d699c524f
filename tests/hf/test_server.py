"""Rollouts from a server: loopback HTTP, its faults, new weights for it, and `transformers serve` itself."""

import asyncio
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from alignkit import hf
from alignkit.hf import dialects, server
from alignkit.hf.sampling import Answer, answers
from alignkit.hf.server import server_answers, sync
from alignkit.sampling import Sampling
from tests.hf.fake_server import Fake, Switch, scripted, serving

PROMPTS = [[7, 8, 9], [10, 11], [12]]
SEEDS = [2**62 + i for i in range(6)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(server, "BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def switch():
    """A server that is whichever fake it is told to be."""
    with serving(Switch()) as (app, url):
        yield app, url


@pytest.fixture
def serve(switch):
    app, url = switch

    def be(fake):
        app.fake = fake
        return url

    return be


@pytest.fixture
def said(monkeypatch):
    """What is warned of, once."""
    lines = {}
    for module in (server, dialects):
        monkeypatch.setattr(module.logger, "warning_once", lambda line: lines.setdefault(line))
    return lines


def ask(url, tokenizer=None, sampling=None, prompts=PROMPTS, n=2, seeds=None, **options):
    seeds = SEEDS[: n * len(prompts)] if seeds is None else seeds
    return server_answers(url, tokenizer, prompts, sampling or Sampling(max_new=8), n=n, seeds=seeds, **options)


def in_process(policy, tokenizer):
    """Draw as the policy does in this process."""

    def draw(prompt, spec, seed):
        ids, logps, truncated = answers(policy, tokenizer, [prompt], seeds=[seed])[0]
        return ids, logps, not truncated

    return draw


@contextmanager
def program(*command, **environment):
    process = subprocess.Popen([sys.executable, *command], env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port):
    for _ in range(1200):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("it does not listen")


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_answer_for_each_seed_in_the_order_of_the_prompts(kind, serve):
    fake = Fake(kind=kind, delay=0.01)
    url = serve(fake)
    got = ask(url)
    assert got == ask(f"{url}/v1/")
    expected = [scripted(PROMPTS[i // 2], {}, seed % 2**53) for i, seed in enumerate(SEEDS)]
    assert got == [Answer(ids, logps, not ended) for ids, logps, ended in expected]
    assert {x.truncated for x in got} == {True, False}
    assert all(a != b for a, b in zip(got[::2], got[1::2]))


def test_what_vllm_is_asked(serve):
    fake, spec = Fake(), Sampling(max_new=5, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, stop=("x",))
    url = serve(fake)
    ask(url, sampling=spec, prompts=[[1, 2]], n=1, seeds=[4])
    ask(url, prompts=[[1, 2]], n=1, seeds=[4])
    ask(url, prompts=[[1, 2]], n=1, seeds=[4], greedy=True, model="other")
    given, plain, greedy = fake.bodies("/v1/completions")
    assert given == {
        "model": "base",
        "prompt": [1, 2],
        "max_tokens": 5,
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.0,
        "stop": ["x"],
        "seed": 4,
        "return_token_ids": True,
        "logprobs": None,
    }
    assert (plain["temperature"], plain["top_k"], plain["logprobs"]) == (1, -1, 0)
    assert (greedy["temperature"], greedy["logprobs"], greedy["model"]) == (0, None, "other")


def test_what_sglang_is_asked(serve):
    fake, spec = Fake(kind="sglang"), Sampling(max_new=5, top_k=3, stop=("x",))
    url = serve(fake)
    (answer,) = ask(url, sampling=spec, prompts=[[1, 2]], n=1, seeds=[4])
    ask(url, prompts=[[1, 2]], n=1, model="other")
    body, other = fake.bodies("/generate")
    assert other["lora_path"] == "other"
    assert body["input_ids"] == [1, 2]
    assert body["return_logprob"]
    assert "lora_path" not in body
    assert body["sampling_params"] == {
        "max_new_tokens": 5,
        "temperature": 1,
        "top_k": 3,
        "top_p": 1,
        "min_p": 0,
        "repetition_penalty": 1,
        "stop": ["x"],
        "sampling_seed": 4,
    }
    assert answer.logps is None


@pytest.mark.parametrize(("kind", "dev", "mode", "temperature", "greedy", "tells"), [
    ("vllm", False, "raw_logprobs", 1.0, False, True),
    ("vllm", False, "processed_logprobs", 0.7, False, False),
    ("vllm", True, "raw_logprobs", 0.7, False, False),
    ("vllm", True, "processed_logprobs", 0.7, False, True),
    ("vllm", True, "processed_logprobs", 1.0, True, False),
    ("sglang", True, "processed_logprobs", 1.0, False, True),
    ("sglang", True, "processed_logprobs", 0.7, False, False),
])  # fmt: skip
def test_log_probs_only_of_what_was_sampled(kind, dev, mode, temperature, greedy, tells, serve):
    fake = Fake(kind=kind, dev=dev)
    fake.mode = mode
    url = serve(fake)
    got = ask(url, sampling=Sampling(temperature=temperature), greedy=greedy)
    assert [x.logps is not None for x in got] == [tells] * 6


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_policy_samples_by_a_server_as_in_its_process(kind, serve):
    policy, tokenizer = hf.causal_lm("builtin:tiny", sampling=Sampling(max_new=6))
    texts = ["Film: The Golden River\nReview:", "The plot"]
    url = serve(Fake(in_process(policy, tokenizer), kind=kind))
    away, _ = hf.causal_lm("builtin:tiny", sampling=Sampling(max_new=6, server=url))
    there, here = (hf.sample(x, tokenizer, texts, n=2, seed=2, step=5) for x in (away, policy))
    assert there["ids"].shape == here["ids"].shape
    torch.testing.assert_close(there["sampler_logps"], policy(there["ids"], there["mask"]).detach())
    assert (there["sampler_logps"] < 0).equal(there["mask"])


def test_no_more_requests_at_a_time_than_said(serve):
    fake = Fake(delay=0.05)
    url = serve(fake)
    ask(url, n=8, seeds=range(24), concurrency=5)
    assert fake.most == 5
    assert len(fake.bodies("/v1/completions")) == 24


FAULTS = [500, 503, 429, "truncated", "cut", "fewer", "fewer logps", "abort"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again(fault, serve):
    fake = Fake()
    url = serve(fake)
    right = ask(url)
    fake.faults = [fault, fault]
    assert ask(url) == right
    assert len(fake.bodies("/v1/completions")) == 14


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_after_a_few_tries(fault, serve):
    fake = Fake()
    fake.faults = [fault] * 100
    url = serve(fake)
    with pytest.raises(ValueError, match="failed 3 times at") as caught:
        ask(url, retries=2, concurrency=1)
    said = {500: "the words of the server", "abort": "'abort'", "fewer": "0 choices", "truncated": "no whole JSON"}
    assert f"{url}/v1/completions" in str(caught.value)
    assert said.get(fault, "") in str(caught.value)
    assert len(fake.bodies("/v1/completions")) == 3


def test_pauses_grow_and_hold_back_other_requests(monkeypatch, serve):
    monkeypatch.setattr(server, "BACKOFF", 0.1)
    fake = Fake()
    fake.faults = [500] * 3
    url = serve(fake)
    start = time.perf_counter()
    ask(url, concurrency=1)
    assert time.perf_counter() - start > 0.7
    seeds = [body["seed"] for body in fake.bodies("/v1/completions")]
    assert seeds[:4] == [SEEDS[0] % 2**53] * 4


def test_a_server_that_does_not_reply(serve):
    fake = Fake()
    fake.faults = ["hang"] * 100
    url = serve(fake)
    with pytest.raises(ValueError, match=r"failed 2 times.*no reply in 0.2 s"):
        ask(url, timeout=0.2, retries=1)


def test_no_server():
    with pytest.raises(ValueError, match=r"failed 2 times at http://127.0.0.1:9/load_model.*Is it up"):
        ask("http://127.0.0.1:9", retries=1)


def test_a_refusal_is_final_and_keeps_the_key_to_itself(monkeypatch, serve):
    monkeypatch.setenv("OPENAI_API_KEY", "words of")
    fake = Fake()
    fake.faults = [400]
    url = serve(fake)
    with pytest.raises(ValueError, match=r"HTTP 400.*the \.\.\. the server"):
        ask(url, concurrency=1)
    assert len(fake.bodies("/v1/completions")) == 1
    assert {headers["authorization"] for _, _, headers in fake.requests} == {"Bearer words of"}


def test_logits_for_log_probs(serve):
    fake = Fake()
    fake.faults = ["logits"]
    url = serve(fake)
    with pytest.raises(ValueError, match="tells 3 as the log-prob"):
        ask(url)


@pytest.mark.parametrize("url", ["localhost:8000", "http://me:secret@host:1", "http://host:1/v1?key=secret", "ftp://a"])
def test_a_url_is_checked_and_not_repeated(url):
    with pytest.raises(ValueError, match=r"server=.*must be http://host:port") as caught:
        ask(url)
    assert "secret" not in str(caught.value)


def test_a_seed_for_each_answer():
    with pytest.raises(ValueError, match="seeds are 6, but must be one for each of n=3 answers to 3 prompts"):
        ask("http://127.0.0.1:9", n=3, seeds=SEEDS)


def test_a_server_killed_in_a_rollout(monkeypatch):
    port = free_port()
    with program("-m", "tests.hf.fake_server", str(port)) as first:
        wait_for(port)
        threading.Timer(0.5, first.kill).start()
        start = time.perf_counter()
        with pytest.raises(ValueError, match=f"failed 3 times at http://127.0.0.1:{port}/v1/completions"):
            ask(f"http://127.0.0.1:{port}", n=100, seeds=range(300), concurrency=4, retries=2)
        assert time.perf_counter() - start < 10

    monkeypatch.setattr(server, "BACKOFF", 0.5)  # long enough for the next to start
    with program("-m", "tests.hf.fake_server", str(port)) as first:
        wait_for(port)
        threading.Timer(0.3, first.kill).start()
        again = program("-m", "tests.hf.fake_server", str(port))
        starter = threading.Timer(0.6, again.__enter__)
        starter.start()
        got = ask(f"http://127.0.0.1:{port}", n=10, seeds=range(30), concurrency=4)
        starter.join()
        again.__exit__(None, None, None)
    assert [x.ids for x in got] == [scripted(PROMPTS[i // 10], {}, i)[0] for i in range(30)]


@pytest.mark.parametrize("own_handler", [False, True])
def test_an_interrupt_gets_through(own_handler, serve):
    def raises(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, raises if own_handler else signal.default_int_handler)
    try:
        url = serve(Fake(delay=30))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            ask(url)
        assert time.perf_counter() - start < 10
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_notebook(serve):
    async def cell():
        return ask(url)

    url = serve(Fake())
    assert asyncio.run(cell()) == ask(url)


def test_text_alone_is_encoded_again(tokenizer, said, serve):
    texts = iter([" truly superb.", " dull", " dull"])
    endings = iter([True, False, True])
    fake = Fake(lambda *_: ([], [], next(endings)), kind="somebody")
    fake._completion = lambda *x: {
        "choices": [{"text": next(texts), "finish_reason": "stop" if x[3] else "length"}]
    }  # as others reply
    url = serve(fake)
    got = ask(url, tokenizer, n=1, seeds=[1, 2, 3], concurrency=1)
    eos = tokenizer.eos_token_id
    assert got[0] == Answer([*tokenizer(" truly superb.")["input_ids"], eos], None, False)
    assert got[1:] == [Answer(tokenizer(" dull")["input_ids"], None, True), Answer([*got[1].ids, eos], None, False)]
    assert [line for line in said if "encoded again" in line]
    assert set(fake.bodies("/v1/completions")[0]) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


@pytest.mark.parametrize("spec", [{"top_k": 3}, {"min_p": 0.1}, {"stop": ("x",)}])
def test_no_filter_is_lost_on_another_server(spec, tokenizer, serve):
    with pytest.raises(ValueError, match=f"{next(iter(spec))}=.* needs vLLM"):
        ask(serve(Fake(kind="somebody")), tokenizer, Sampling(**spec))


def test_a_stop_string_ends_text_instead_of_the_end_of_the_sequence(tokenizer, said):
    dialect = dialects.Transformers(tokenizer, Sampling(stop=("dull",)), False, False, None, None)
    ids = tokenizer(" truly dull")["input_ids"]
    assert dialect.answer({"choices": [{"text": " truly dull", "finish_reason": "stop"}]}) == Answer(ids, None, False)


def test_a_prompt_as_text_has_one_bos(bos_tokenizer):
    dialect = dialects.Transformers(bos_tokenizer, Sampling(), False, False, None, None)
    ids = bos_tokenizer("The plot")["input_ids"]
    assert dialect.request(ids, 1)[1]["prompt"] == "The plot"
    letters = [bos_tokenizer.bos_token_id, *(bos_tokenizer.convert_tokens_to_ids(x) for x in "The")]
    with pytest.raises(ValueError, match=r"other tokens than it: .*The"):
        dialect.request(letters, 1)


def changed(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return policy


@pytest.mark.parametrize(("kind", "asked"), [
    ("vllm", ["/collective_rpc", "/reset_prefix_cache"]),
    ("sglang", ["/update_weights_from_disk"]),
])  # fmt: skip
def test_new_weights_reach_the_server(kind, asked, tmp_path, serve):
    policy, tokenizer = hf.causal_lm("builtin:tiny", value_head=True, sampling=Sampling(max_new=4))
    served, _ = hf.causal_lm("builtin:tiny", sampling=Sampling(max_new=4))
    fake = Fake(in_process(served, tokenizer), kind=kind)
    fake.load = lambda folder: served.load_state_dict(hf.causal_lm(folder)[0].state_dict())
    fake.adapters = ["alignkit-1"]
    changed(policy)
    url = serve(fake)
    before = ask(url, prompts=[[1, 2, 3]])
    assert sync(url, policy, tokenizer, tmp_path / "shared") is True
    after = ask(url, prompts=[[1, 2, 3]])
    expected = answers(policy, tokenizer, [[1, 2, 3]], n=2, seeds=[x % 2**53 for x in SEEDS[:2]])
    assert [x.ids for x in after] == [x.ids for x in expected] != [x.ids for x in before]
    assert [x for y in after for x in y.logps] == pytest.approx([x for y in expected for x in y.logps], abs=1e-4)
    assert [path for path, body, _ in fake.requests if body is not None and "unload" not in path][2:-2] == asked
    assert fake.adapters == []
    assert not list(tmp_path.rglob("value_head*"))


@pytest.mark.parametrize(("kind", "prefix"), [("vllm", "/v1"), ("sglang", "")])
def test_an_adapter_is_a_new_model_each_time(kind, prefix, tmp_path, serve):
    policy, tokenizer = hf.causal_lm("builtin:tiny", lora=2)
    fake, folders = Fake(kind=kind), []
    fake.load = folders.append
    url = serve(fake)
    for _ in range(11):
        assert sync(url, policy, tokenizer, tmp_path)
    ask(url)
    assert fake.adapters == ["alignkit-11"]
    assert folders == [str(tmp_path)] * 11
    assert (tmp_path / "adapter_model.safetensors").exists()
    path, field = ("/v1/completions", "model") if kind == "vllm" else ("/generate", "lora_path")
    assert {body[field] for body in fake.bodies(path)} == {"alignkit-11"}
    assert len(fake.bodies(f"{prefix}/load_lora_adapter")) == 11


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("kind", ["vllm", "sglang", "somebody"])
def test_a_server_that_takes_no_weights_is_warned_of_once(kind, lora, tmp_path, monkeypatch, said, serve):
    monkeypatch.chdir(tmp_path)
    policy, tokenizer = hf.causal_lm("builtin:tiny", lora=lora)
    url = serve(Fake(kind=kind, dev=False))
    assert [sync(url, policy, tokenizer) for _ in range(2)] == [False, False]
    (line,) = said
    assert url in line
    assert f"{tmp_path}/runs/server-127.0.0.1-" in line
    assert line.startswith("NEW WEIGHTS DO NOT REACH")


def test_a_failure_to_take_weights_is_an_error(tmp_path, monkeypatch, serve):
    monkeypatch.setenv("ALIGNKIT_SERVER_FOLDER", str(tmp_path / "shared"))
    policy, tokenizer = hf.causal_lm("builtin:tiny")
    fake = Fake()
    fake.faults = [True] * 9
    url = serve(fake)
    with pytest.raises(ValueError, match=r"failed 2 times at .*/collective_rpc.*the words"):
        sync(url, policy, tokenizer, retries=1)
    assert (tmp_path / "shared" / "config.json").exists()


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "alignkit.hf.server")
    with pytest.raises(ImportError, match=r"pip install 'alignkit\[server\]'"):
        importlib.import_module("alignkit.hf.server")


def test_transformers_serve(tmp_path, said):
    spec = Sampling(max_new=12)
    policy, tokenizer = hf.causal_lm("builtin:tiny", sampling=spec)
    hf.save(policy, tokenizer, tmp_path)
    port = free_port()
    url, command = f"http://127.0.0.1:{port}", ["serve", str(tmp_path), "--port", str(port), "--device", "cpu"]
    code = "from transformers.cli.transformers import main; main()"
    with program("-c", code, *command, HF_HOME=str(tmp_path / "none"), OMP_NUM_THREADS="1"):
        wait_for(port)
        texts = ["Film: The Golden River\nReview:", "The plot"]
        prompts = [tokenizer(text)["input_ids"] for text in texts]
        drawn = [ask(url, tokenizer, spec, prompts, seeds=range(4)) for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert len({str(x) for x in drawn[0]}) == 4
        assert all(x.logps is None for x in drawn[0])
        likeliest = text_of(tokenizer, answers(policy, tokenizer, prompts, seeds=[0, 0], greedy=True))
        greedy = ask(url, tokenizer, spec, prompts, n=1, seeds=[0, 0], greedy=True)
        first = ask(url, tokenizer, Sampling(max_new=12, top_k=1), prompts, n=1, seeds=[0, 0])
        assert text_of(tokenizer, greedy) == text_of(tokenizer, first) == likeliest

        assert sync(url, changed(policy), tokenizer, tmp_path)
        moved = text_of(tokenizer, answers(policy, tokenizer, prompts, seeds=[0, 0], greedy=True))
        assert moved != likeliest
        assert text_of(tokenizer, ask(url, tokenizer, spec, prompts, n=1, seeds=[0, 0], greedy=True)) == moved
        assert not sync(url, policy, tokenizer, tmp_path / "elsewhere")
    assert [bool(re.match("The server tells text|NEW WEIGHTS", line)) for line in said] == [True, True]


def text_of(tokenizer, given):
    return [tokenizer.decode(x.ids, skip_special_tokens=True) for x in given]
