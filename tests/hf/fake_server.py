"""A server on loopback in the shape of vLLM or SGLang, whose faults and weights a test decides.

Run as a program it listens on the port that is its argument, and takes a tenth of a second for an answer.
"""

import asyncio
import random
import sys
import threading
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

EOS = 0


def scripted(prompt, sampling, seed):
    """Tokens that depend on the prompt and the seed, their log-probs, and whether the answer ended by itself."""
    rng = random.Random(f"{prompt} {seed}")
    length = rng.randint(1, 10)
    ids = [rng.randrange(300, 500) for _ in range(min(length, 8))] + [EOS] * (length < 8)
    return ids, [-x / 100 for x in ids], ids[-1] == EOS


class Fake:
    def __init__(self, draw=scripted, *, kind="vllm", dev=True, delay=0.0):
        self.draw, self.kind, self.dev, self.delay = draw, kind, dev, delay
        self.requests, self.faults, self.adapters, self.mode = [], [], [], "raw_logprobs"
        self.under_way = self.most = 0
        self.load = lambda folder: None
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.reply, methods=["GET", "POST"])

    def bodies(self, path):
        return [body for asked, body, _ in self.requests if asked == path]

    async def reply(self, path: str, request: Request):
        body = await request.json() if request.method == "POST" else None
        self.requests.append((f"/{path}", body, dict(request.headers)))
        route = getattr(self, path.removeprefix("v1/").replace("/", "_"), None)
        if path.startswith("_") or route is None:
            return JSONResponse({"detail": "Not Found"}, 404)
        return await route(body)

    async def models(self, _):
        names = ["base", *self.adapters]
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": self.kind} for name in names]}

    async def completions(self, body):
        return await self._answer(body["prompt"], body, body["seed"], self._completion)

    async def generate(self, body):
        return await self._answer(
            body["input_ids"], body["sampling_params"], body["sampling_params"]["sampling_seed"], self._native
        )

    async def _answer(self, prompt, sampling, seed, shape):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            fault = self.faults.pop(0) if self.faults else None
            await asyncio.sleep(60 if fault == "hang" else self.delay)
            reply = shape(sampling, *self.draw(prompt, sampling, seed), fault)
        finally:
            self.under_way -= 1
        if isinstance(fault, int):
            return JSONResponse({"object": "error", "message": "the words of the server", "code": fault}, fault)
        whole = JSONResponse(reply).body
        if fault == "truncated":
            return Response(whole[:-20], media_type="application/json")
        if fault == "cut":  # fewer bytes than announced
            return Response(whole[:-20], headers={"content-length": str(len(whole))}, media_type="application/json")
        return Response(whole, media_type="application/json")

    def _completion(self, body, ids, logps, ended, fault):
        choice = {
            "index": 0,
            "text": "".join(f" {x}" for x in ids),
            "finish_reason": "abort" if fault == "abort" else "stop" if ended else "length",
            "logprobs": None,
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids}
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": logps[:-1] if fault == "fewer logps" else logps}
        if fault == "logits":
            choice["logprobs"]["token_logprobs"][0] = 3.0
        return {"object": "text_completion", "choices": [] if fault == "fewer" else [choice]}

    def _native(self, body, ids, logps, ended, fault):
        tokens = [[logp, token, None] for logp, token in zip(logps, ids)]
        reason = {"type": "abort" if fault == "abort" else "stop" if ended else "length"}
        return {"text": "", "meta_info": {"finish_reason": reason, "output_token_logprobs": tokens}}

    async def server_info(self, _):
        config = {"vllm_config": {"model_config": {"logprobs_mode": self.mode}}}
        return config if self.dev else JSONResponse({"detail": "Not Found"}, 404)

    async def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        return self._loaded(body["kwargs"]["weights_path"], Response())

    async def reset_prefix_cache(self, _):
        return Response()

    async def update_weights_from_disk(self, body):
        return self._loaded(body["model_path"], JSONResponse({"success": True, "message": ""}))

    async def load_lora_adapter(self, body):
        self.adapters.append(body["lora_name"])
        return self._loaded(body["lora_path"], PlainTextResponse("Success: LoRA adapter added"))

    async def unload_lora_adapter(self, body):
        self.adapters.remove(body["lora_name"])
        return PlainTextResponse("Success: LoRA adapter removed")

    def _loaded(self, folder, reply):
        if not self.dev:
            return JSONResponse({"detail": "Not Found"}, 404)
        if self.faults and self.faults.pop(0):
            return JSONResponse({"error": "the words of the server"}, 500)
        self.load(folder)
        return reply


class Switch:
    """An application that is whichever fake it has at the time."""

    fake: Fake

    async def __call__(self, scope, receive, send):
        await self.fake.app(scope, receive, send)


@contextmanager
def serving(app):
    """`app` and its URL; a thread serves it meanwhile."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


if __name__ == "__main__":
    uvicorn.run(Fake(delay=0.1).app, port=int(sys.argv[1]), log_level="critical")
