"""Answers from a server: vLLM, SGLang, `transformers serve` or another OpenAI-compatible one; and new weights for it.

All answers of a rollout or an error, never some of them. What each server takes and tells: `hf/dialects.py`.
"""

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

try:
    import httpx
except ImportError as error:
    raise ImportError("a server needs httpx: pip install 'alignkit[server]'") from error
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers.utils import logging

from alignkit.hf.dialects import DIALECTS, Dialect, Fault, Transformers, version
from alignkit.hf.loading import without_bars
from alignkit.hf.processes import process
from alignkit.hf.sampling import Answer
from alignkit.sampling import Sampling

logger = logging.get_logger(__name__)

BACKOFF = 0.5
"""Seconds before a request is sent again; twice as many before each further time."""


def server_answers(
    url: str,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    sampling: Sampling,
    *,
    n: int = 1,
    greedy: bool = False,
    seeds: Sequence[int],
    model: str | None = None,
    concurrency: int = 64,
    timeout: float = 600.0,
    retries: int = 5,
) -> list[Answer]:
    """`n` answers to each prompt from the server at `url`, prompt-major; a ValueError says why there are none.

    Each answer is a request with a seed of its own; `concurrency` are under way at a time. A request that the server
    does not answer in `timeout` seconds, or not as it should, is sent again up to `retries` times after growing pauses;
    one that it refuses is not. Log-probs are of the distribution that was sampled, None if the server tells no such.
    `model` is one of several that it serves; by default the newest adapter that `sync` gave it, or else the first.
    """
    if len(seeds) != n * len(encoded):
        raise ValueError(f"seeds are {len(seeds)}, but must be one for each of n={n} answers to {len(encoded)} prompts")

    async def ask_all(server: _Server) -> list[Answer]:
        kind, models = await _identify(server)
        if kind.sequential:
            server.places = asyncio.Semaphore(1)
        told = not greedy and (kind.tells(sampling) or await _tells_all(server, kind))
        base = next((name for name in models if not version(name)), None)
        dialect = kind(tokenizer, sampling, greedy, told, model or next(iter(models), None), base)
        requests = [dialect.request(encoded[i // n], seed % 2**53) for i, seed in enumerate(seeds)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(server.ask(path, body, dialect.answer)) for path, body in requests]
        return [task.result() for task in tasks]

    return _run(ask_all, url, concurrency, timeout, retries)


def sync(
    url: str,
    policy: Any,
    tokenizer: Any,
    folder: str | Path | None = None,
    *,
    timeout: float = 600.0,
    retries: int = 5,
) -> bool:
    """Write the policy, or its adapter, into `folder`, which the server sees under this path, and have it read that.

    False, and a warning once, if the server offers no way to; a ValueError if it tries and fails. Caches of the old
    weights are dropped. Every process calls it, the main one acts. The folder is by default that of the environment
    variable ALIGNKIT_SERVER_FOLDER, or else `runs/server-HOST-PORT`.
    """
    default = f"runs/server-{urlsplit(_checked(url)).netloc.replace(':', '-')}"
    folder, done = Path(folder or os.environ.get("ALIGNKIT_SERVER_FOLDER") or default).resolve(), False
    if process().is_main_process:
        done = _run(partial(_reload, lm=policy.lm, tokenizer=tokenizer, folder=folder), url, 1, timeout, retries)
    done = broadcast_object_list([done])[0]
    if not done:
        logger.warning_once(
            f"NEW WEIGHTS DO NOT REACH THE SERVER at {_checked(url)}: it goes on sampling with those it has, further "
            f"from the policy with every step. Start it so that it can read them from {folder}: see docs/server.md"
        )
    return done


class _Refused(ValueError):
    """What the next try would meet again; `status` is HTTP's."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _Server:
    def __init__(self, url: str, concurrency: int, timeout: float, retries: int):
        self.url, self.timeout, self.retries = _checked(url), timeout, retries
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.places = asyncio.Semaphore(concurrency)
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else None,
            timeout=httpx.Timeout(None, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=concurrency),
        )

    async def ask(self, path: str, body: Any = None, read: Callable[[Any], Any] | None = None) -> Any:
        """`read` of the JSON that a POST of `body` brings, or a GET without one."""
        async with self.places:
            for attempt in range(self.retries + 1):
                if attempt:
                    await asyncio.sleep(BACKOFF * 2 ** (attempt - 1))
                try:
                    reply = await self._send(path, body)
                    return read(reply.json()) if read else None
                except TimeoutError:
                    fault = f"no reply in {self.timeout:g} s"
                except (Fault, httpx.RequestError) as error:
                    fault = str(error) or type(error).__name__
                except (json.JSONDecodeError, UnicodeDecodeError):
                    fault = f"its reply is no whole JSON: ...{reply.text[-80:]}"
                except (KeyError, IndexError, TypeError, AttributeError) as error:
                    fault = f"its reply lacks something: {type(error).__name__} {error}"
        raise ValueError(
            f"the server failed {self.retries + 1} times at {self.url}{path}: {fault}. Is it up and within reach? No "
            "answer of this rollout is used; a run goes on from its last checkpoint with --resume-from-checkpoint last"
        )

    async def _send(self, path: str, body: Any) -> httpx.Response:
        async with asyncio.timeout(self.timeout):
            reply = await self.http.request("GET" if body is None else "POST", self.url + path, json=body)
        if reply.is_success:
            return reply
        words = f"HTTP {reply.status_code} {reply.text[:500]}"
        words = words.replace(self.key, "...") if self.key else words
        if reply.status_code >= 500 or reply.status_code in (408, 429):
            raise Fault(words)
        raise _Refused(f"the server refuses what was asked at {self.url}{path}: {words}", reply.status_code)


def _run(work: Callable[[_Server], Coroutine[Any, Any, Any]], *connection: Any) -> Any:
    async def connected() -> Any:
        server = _Server(*connection)
        async with server.http:
            return await work(server)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run = asyncio.run
    else:
        run = _run_beside
    try:
        return run(connected())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _run_beside(work: Coroutine[Any, Any, Any]) -> Any:
    """In a thread, where this one has an event loop that runs already: in a notebook."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(asyncio.run, work).result()
    finally:
        pool.shutdown(wait=False)  # an interrupt does not wait for it


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ValueError(
            f"server={parts.scheme}://{parts.hostname}... must be http://host:port or https://host:port, without more; "
            "a key goes into the environment variable OPENAI_API_KEY"
        )
    return url.rstrip("/").removesuffix("/v1")


async def _identify(server: _Server) -> tuple[type[Dialect], list[str]]:
    """What it speaks, and the models that it serves, the newest adapter of `sync` first."""
    try:
        await server.ask("/load_model")
    except _Refused as refusal:
        if refusal.status == 405:  # there, but only for POST
            return Transformers, []  # would list all that was ever downloaded
    models = await server.ask("/v1/models", read=lambda reply: {x["id"]: x.get("owned_by") for x in reply["data"]})
    kind = next((DIALECTS[owner] for owner in models.values() if owner in DIALECTS), Dialect)
    return kind, sorted(models, key=version, reverse=True)


async def _tells_all(server: _Server, kind: type[Dialect]) -> bool:
    """Whether the server says that it was started to tell log-probs after temperature and filters."""
    if not kind.config:
        return False
    try:
        return await server.ask(kind.config, read=kind.tells_all)
    except _Refused:
        return False


async def _reload(server: _Server, lm: Any, tokenizer: Any, folder: Path) -> bool:
    kind, models = await _identify(server)
    requests = kind.reload(str(folder), isinstance(lm, PeftModel), [name for name in models if version(name)])
    if requests:
        with without_bars():
            lm.save_pretrained(folder)  # without a value head, which the server would take for a part of it
        tokenizer.save_pretrained(folder)
    try:
        for path, body in requests:
            await server.ask(path, body)
    except _Refused as refusal:
        if refusal.status in kind.offers_no_reload:
            return False
        raise
    return bool(requests)
