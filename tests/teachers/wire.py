"""A server in the wire format of vLLM and of the legacy completions, on a real model, with the true
log-probs of its prompts.

It shares no code with what it tests: log-probs are those of the model's own forward pass, and the
sampling is a plain loop. What was asked is kept in `requests`. Between server and client stand two
layers of faults: `Faults` (statuses, bodies) inside it, and `Proxy` (the connection) before it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response

from opdlab import Policy


class Wire:
    """`dialect`: what the server understands. vllm: everything; legacy: echo with strings, and no
    fields it does not know; chat: only /chat/completions, which starts a new answer whatever
    stands last; mistral: as chat, but `prefix` goes on.
    """

    def __init__(
        self,
        policy: Policy,
        name: str = "market-teacher",
        dialect: str = "vllm",
        most: int = 10_000,
        choices: int = 99,
    ) -> None:
        self.model, self.tokenizer, self.eos = (
            policy.weights.model,
            policy.tokenizer,
            policy.weights.eos,
        )
        self.name, self.dialect, self.most, self.choices = name, dialect, most, choices
        self.vocab = policy.weights.vocab_size
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.used: list[int] = []  # tokens of each reply
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        known = {
            "model",
            "messages",
            "prompt",
            "n",
            "max_tokens",
            "temperature",
            "seed",
            "echo",
            "logprobs",
        }
        known |= {"top_p", "presence_penalty", "frequency_penalty", "stop"}
        if self.dialect == "vllm":
            known |= {
                "top_k",
                "min_p",
                "min_tokens",
                "repetition_penalty",
                "include_stop_str_in_output",
                "prompt_logprobs",
                "return_tokens_as_token_ids",
                "continue_final_message",
                "add_generation_prompt",
                "add_special_tokens",
            }
        if extra := set(body) - known:
            return 400, {"error": {"message": f"unknown fields {sorted(extra)}"}}
        if path == "/tokenize" and self.dialect == "vllm":
            return 200, {
                "tokens": self.tokenizer(
                    body["prompt"], add_special_tokens=body["add_special_tokens"]
                )["input_ids"]
            }
        if body.get("model", self.name) != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if path == "/v1/completions" and self.dialect in ("vllm", "legacy"):
            return self.completion(body)
        if path == "/v1/chat/completions":
            return self.chat(body)
        return 404, {"detail": "Not Found"}

    def completion(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        if not all(0 <= i < self.vocab for i in ids):
            return 400, {"error": {"message": "Token id is out of vocabulary"}}
        asked = max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
        if asked > self.most:
            return 400, {
                "error": {
                    "message": (
                        f"Requested {asked} log-probs, which is greater than max allowed:"
                        f" {self.most}"
                    )
                }
            }
        choices = [
            {"index": i, "text": text, "finish_reason": end, "logprobs": None}
            for i, (text, end, _) in enumerate(self.texts(ids, body))
        ]
        if "prompt_logprobs" in body:
            choices[0]["prompt_logprobs"] = self.prompt_logprobs(ids, body["prompt_logprobs"])
        if body.get("echo"):
            choices[0]["logprobs"] = self.echo(
                ids, body["logprobs"], body.get("return_tokens_as_token_ids", False)
            )
        return 200, self.reply(choices, ids)

    def chat(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        messages = body["messages"]
        goes_on = body.get("continue_final_message") or (
            self.dialect == "mistral" and messages[-1].get("prefix")
        )
        begun = messages[-1]["content"] if goes_on else ""
        chat = messages[:-1] if goes_on else messages
        text = (
            self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            + begun
        )
        ids = self.tokenizer(text)["input_ids"]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": end}
            for i, (text, end, _) in enumerate(self.texts(ids, body))
        ]
        return 200, self.reply(choices, ids)

    def reply(self, choices: list[dict[str, Any]], ids: list[int]) -> dict[str, Any]:
        self.used.append(len(ids) + self.written)
        return {
            "id": "x",
            "object": "y",
            "created": 0,
            "model": self.name,
            "choices": choices,
            "usage": {"prompt_tokens": len(ids), "completion_tokens": self.written},
        }

    @torch.no_grad()
    def texts(self, ids: list[int], body: dict[str, Any]) -> list[tuple[str, str, int]]:
        """One text a sample, of a seed of its own; decoded together with what stands before, as
        vLLM does.
        """
        out = []
        read = lambda row: self.tokenizer.decode(row, skip_special_tokens=True)
        before = len(read(ids))
        for j in range(min(body.get("n", 1), self.choices)):
            generator = torch.Generator().manual_seed(body.get("seed", 0) + j)
            row, end, held = list(ids), "length", []
            for _ in range(body["max_tokens"]):
                logits = self.model(torch.tensor([row])).logits[0, -1].double()
                if body["temperature"] == 0:
                    row.append(int(logits.argmax()))
                else:
                    row.append(
                        int(
                            torch.multinomial(
                                (logits / body["temperature"]).softmax(-1), 1, generator=generator
                            )
                        )
                    )
                held = [stop for stop in body.get("stop", ()) if stop in read(row)[before:]]
                if row[-1] in self.eos or held:
                    end = "stop"
                    break
            text = read(row)[before:]
            for stop in held:
                keeps = body.get("include_stop_str_in_output", False)
                text = text[: text.find(stop) + len(stop) * keeps]
            out.append((text, end, len(row) - len(ids)))
        self.written = sum(count for _, _, count in out)
        return out

    @torch.no_grad()
    def logp(self, ids: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([ids])).logits[0, :, : self.vocab].log_softmax(-1)

    def prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        out: list[dict[str, Any] | None] = [None]
        for row, token in zip(self.logp(ids), ids[1:], strict=False):
            order = row.argsort(descending=True).tolist()
            shown = dict.fromkeys([token, *order[:k]])
            out.append(
                {
                    str(i): {
                        "logprob": row[i].item(),
                        "rank": order.index(i) + 1,
                        "decoded_token": self.tokenizer.decode([i]),
                    }
                    for i in shown
                }
            )
        return out

    def echo(self, ids: list[int], k: int, by_id: bool) -> dict[str, Any]:
        name = lambda i: f"token_id:{i}" if by_id else self.tokenizer.decode([i])
        logp = self.logp(ids)
        tops: list[dict[str, float] | None] = [
            {name(i): row[i].item() for i in row.topk(min(k, self.vocab)).indices.tolist()}
            for row in logp
        ]
        own: list[float | None] = [row[i].item() for row, i in zip(logp, ids[1:], strict=False)]
        return {
            "tokens": [*map(name, ids), "x"],
            "token_logprobs": [None, *own, -1.0],
            "top_logprobs": [None, *tops[:-1], {"x": -1.0}],
        }

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/{path:path}")
        def any_path(path: str, body: dict[str, Any]) -> Response:
            with self.lock:
                status, reply = self.answer(f"/{path}", body)
            return Response(
                json.dumps(reply), status, media_type="application/json"
            )  # json.dumps: NaN stays NaN

        @app.middleware("http")
        async def remember(request: Any, call_next: Callable[[Any], Any]) -> Any:
            body = await request.body()
            self.requests.append(
                (request.url.path, json.loads(body or b"{}"), dict(request.headers))
            )
            return await call_next(request)

        return app


class Faults:
    """ASGI layer: the next requests meet the faults in `queue`, one each (None: no fault); then all
    meet `always`.
    """

    def __init__(self, app: Any) -> None:
        self.app, self.queue, self.always, self.met = app, [], None, 0
        self.lock = threading.Lock()

    def clear(self) -> None:
        self.queue, self.always, self.met = [], None, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with self.lock:
            fault = self.queue.pop(0) if self.queue else self.always
            self.met += fault is not None
        if fault is None:
            return await self.app(scope, receive, send)
        if isinstance(fault, tuple):  # a status with headers, without asking the server
            return await self.say(
                send, fault[0], b'{"error": {"message": "made to fail"}}', fault[1]
            )
        if fault == "slow":
            await asyncio.sleep(6)
            return await self.app(scope, receive, send)
        body = await self.body_of(scope, receive)
        if fault == "cut":  # fewer bytes than announced, then the end of the connection
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [
                        (b"content-type", b"application/json"),
                        (b"content-length", b"%d" % len(body)),
                    ],
                }
            )
            await send(
                {"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True}
            )
            raise ConnectionError("cut on purpose")
        if callable(fault):
            reply = json.loads(body)
            fault(reply)
            body = json.dumps(reply).encode()
        else:
            body = {
                "broken": body[: len(body) // 2],
                "html": b"<html>busy</html>",
                "list": b"[]",
                "nothing": b"",
            }[fault]
        await self.say(send, 200, body, {})

    async def body_of(self, scope: Any, receive: Any) -> bytes:
        parts = []

        async def keep(message: Any) -> None:
            parts.append(message.get("body", b""))

        await self.app(scope, receive, keep)
        return b"".join(parts)

    async def say(self, send: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
        listed = [
            (b"content-type", b"application/json"),
            *((k.encode(), v.encode()) for k, v in headers.items()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": listed})
        await send({"type": "http.response.body", "body": body})


class Proxy:
    """A TCP proxy before a port. mode: pass, refuse (nobody listens), drop (closes at once), silent
    (answers nothing).
    """

    def __init__(self, port: int) -> None:
        self.target, self.mode, self.dropped = port, "pass", 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(client)
            if self.mode == "drop":
                self.dropped += 1
                client.close()
                continue
            if self.mode == "silent":
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            self.open.append(server)
            for a, b in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.mode == "drop":
                    self.dropped += 1
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()

    def hang_up(self) -> None:
        """Close every open connection, so that the next requests meet the mode of the moment."""
        for one in self.open:
            one.close()
        self.open.clear()

    def close(self) -> None:
        self.listener.close()
        self.hang_up()


@contextmanager
def served(app: Any) -> Any:
    """The app on a free loopback port, in a thread; gives the port."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
