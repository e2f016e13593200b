"""A server that speaks SGLang's HTTP interface, for tests of the client: `python tests/fake_sglang.py SERVER_ARGUMENTS...`.

It computes with the model of --model-path by a whole forward pass for each token, joins the client's process group as SGLang
does, and has SGLang's habits: names that it does not know are passed over without a word, an aborted request that waits repeats
its last token, an unknown group or a flush beside requests ends it (0.5.20). `--fault` adds one of its own:

    ignore:NAME   never loads this weight          stale:N    loads nothing from update N on, and says that it has
    shape:NAME    refuses this weight              hang:N     does not answer update N
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _new_process_group_helper, _world, rendezvous

from engine.models import hidden_states, load_model, named_weights, output_weight
from engine.packed_attention import PackedAttention

ROUND_S = 0.01
"""Between two tokens of a request, so that what a test does in between comes in between."""


@dataclass
class Request:
    rid: str
    prompt: list[int]
    params: dict[str, Any]
    logprob_start: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    of_prompt: list[Any] = field(default_factory=list)
    sent: int = 0
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)


class Refused(Exception):
    """Answered with 400."""


class Fake:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.fault, _, self.fault_of = options.fault.partition(":")
        self.model = load_model(options.model_path, dtype="float32", device="cpu", weights=False)
        self.weights = named_weights(self.model)
        for tensor in self.weights.values():
            torch.nn.init.uniform_(tensor, -1e-3, 1e-3)
        self.version, self.updates = "default", 0
        self.paused = self.session = False
        self.groups: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.running: list[Request] = []

    # --- tokens ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        attention = PackedAttention(np.array([[0, len(ids), 0, 0]]), "cpu")
        hidden = hidden_states(self.model, torch.tensor(ids), torch.arange(len(ids)), attention)
        return (hidden @ output_weight(self.model).T).float()

    def schedule(self) -> None:
        while True:
            with self.lock:
                work = [] if self.paused else list(self.running)
                for request in work:
                    self.advance(request)
            time.sleep(ROUND_S)

    def advance(self, request: Request) -> None:
        logits = self.logits(request.prompt + request.tokens)
        if not request.tokens and request.logprob_start == 0:
            rows = torch.log_softmax(logits[:-1], -1)
            given = [[float(rows[i, token]), token, None] for i, token in enumerate(request.prompt[1:])]
            request.of_prompt = [[None, request.prompt[0], None], *given]
        scaled = torch.log_softmax(logits[-1] / request.params["temperature"], -1)
        likely = scaled.exp()
        stops = request.params.get("stop_token_ids", [])
        if float(likely[stops].sum()) < 0.5:  # a test's responses do not stop by chance
            likely[stops] = 0.0
        token = int(torch.multinomial(likely, 1))
        request.tokens.append(token)
        request.logprobs.append(float(scaled[token]))
        request.versions.append(self.version)
        reason = None
        if token in stops:
            reason = {"type": "stop", "matched": token}
        elif len(request.tokens) >= request.params["max_new_tokens"]:
            reason = {"type": "length", "length": len(request.tokens)}
        self.send(request, reason)

    def send(self, request: Request, reason: dict[str, Any] | None) -> None:
        total = len(request.tokens)
        if reason is None and total % self.options.stream_interval != 1 % self.options.stream_interval:
            return
        new = slice(request.sent, None)
        meta = {"id": request.rid, "finish_reason": reason, "weight_version": self.version, "completion_tokens": total}
        if reason is not None:
            self.running.remove(request)
            meta["weight_versions"] = spans(request.versions)
            if reason["type"] == "abort":  # as of a request in SGLang's waiting queue
                new = slice(total - 1, None) if total else new
        pairs = [[p, t, None] for p, t in zip(request.logprobs, request.tokens, strict=True)]
        aborted = reason is not None and reason["type"] == "abort"
        meta["output_token_logprobs"] = pairs if aborted else pairs[new]
        meta["input_token_logprobs"] = request.of_prompt
        request.events.put({"output_ids": request.tokens[new], "meta_info": meta})
        request.sent = total
        if reason is not None:
            request.events.put(None)

    # --- what is asked ---------------------------------------------------------------------------------------------

    def generate(self, body: dict[str, Any]) -> Request:
        request = Request(body["rid"], body["input_ids"], body["sampling_params"], body.get("logprob_start_len", -1))
        with self.lock:
            self.running.append(request)
        return request

    def abort_request(self, body: dict[str, Any]) -> None:
        with self.lock:
            for request in [r for r in self.running if body.get("abort_all") or r.rid.startswith(body["rid"])]:
                self.send(request, {"type": "abort", "message": "Aborted"})

    def pause_generation(self, body: dict[str, Any]) -> None:
        with self.lock:
            self.paused = True

    def continue_generation(self, body: dict[str, Any]) -> None:
        self.paused = False

    def flush_cache(self, body: dict[str, Any]) -> None:
        if self.running and not self.options.session:
            raise Refused("Flush cache failed.")

    def begin_weight_update(self, body: dict[str, Any]) -> None:
        self.change_session(to=True)

    def end_weight_update(self, body: dict[str, Any]) -> None:
        self.change_session(to=False)

    def change_session(self, *, to: bool) -> None:
        if not self.options.session:
            raise Refused("Not Found")
        if self.session == to:
            raise Refused(f"a session is {'open already' if to else 'not open'}")
        self.session = to

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        name, where = body["group_name"], f"tcp://{body['master_address']}:{body['master_port']}"
        places = rendezvous(where, body["rank_offset"], body["world_size"], timeout=timedelta(seconds=60))
        store, rank, world = next(places)
        prefixed, limit = PrefixStore(name, store), timedelta(seconds=60)
        group, _ = _new_process_group_helper(world, rank, [], body["backend"], prefixed, group_name=name, timeout=limit)
        _world.pg_group_ranks[group] = {place: place for place in range(world)}
        self.groups[name] = group

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        group = self.groups.pop(body["group_name"], None)
        if group is None:
            raise Refused("The group to be destroyed does not exist.")
        torch.distributed.destroy_process_group(group)

    @torch.inference_mode()
    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        if body["group_name"] not in self.groups or (body["flush_cache"] and self.running):
            os._exit(1)
        if self.options.session and not self.session:
            raise Refused("must run between begin_weight_update() and end_weight_update()")
        if self.fault == "hang" and self.updates == int(self.fault_of):
            time.sleep(3600)
        arrived = {}
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            arrived[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self.groups[body["group_name"]].broadcast(arrived[name], 0).wait()
        with self.lock:
            for name, tensor in arrived.items():
                if self.fault == "shape" and self.fault_of == name:
                    raise Refused(f"Failed to update parameter online: shapes of {name} differ. Please discard")
                stale = self.fault == "stale" and self.updates >= int(self.fault_of)
                if name in self.weights and not stale and self.fault_of != name:
                    self.weights[name].copy_(tensor)
            if body["weight_version"] is not None:
                self.version = body["weight_version"]
                self.updates += 1

    def get_weights_by_name(self, body: dict[str, Any]) -> list[Any]:
        if body["name"] not in self.weights:
            raise Refused("Get parameter by name failed")
        found: list[Any] = self.weights[body["name"]][: body["truncate_size"]].tolist()
        return found


def spans(versions: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for place, version in enumerate(versions):
        if not found or found[-1]["version"] != version:
            found.append({"version": version, "start": place, "end": place})
        found[-1]["end"] = place + 1
    return found


def handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    options = fake.options
    facts = {
        "/ready": {},
        "/server_info": {
            "version": options.version, "dtype": options.dtype, "tp_size": options.tp_size,
            "disable_overlap_schedule": options.disable_overlap_schedule, "context_length": options.context_length,
        },
        "/model_info": {"architectures": options.architectures.split(",")},
    }  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            self.answer(200, facts[self.path])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
            if self.path == "/generate":
                self.stream(fake.generate(body))
                return
            try:
                self.answer(200, getattr(fake, self.path[1:])(body) or {"success": True})
            except Refused as error:
                self.answer(400, {"success": False, "message": str(error)})

        def answer(self, status: int, what: object) -> None:
            data = json.dumps(what).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def stream(self, request: Request) -> None:
            self.send_response(200)
            self.send_header("connection", "close")
            self.end_headers()
            try:
                for _ in count():
                    event = request.events.get(timeout=600)
                    self.wfile.write(b"data: %s\n\n" % (b"[DONE]" if event is None else json.dumps(event).encode()))
                    self.wfile.flush()
                    if event is None:
                        break
            except OSError:  # a closed connection aborts
                fake.abort_request({"rid": request.rid})
            self.close_connection = True

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model-path", "host", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "tp-size", "context-length", "stream-interval"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--disable-overlap-schedule", action="store_true")
    parser.add_argument("--session", action="store_true")
    parser.add_argument("--version", default="0.5.20")
    parser.add_argument("--architectures", default="LlamaForCausalLM")
    parser.add_argument("--fault", default="")
    options, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    fake = Fake(options)
    threading.Thread(target=fake.schedule, daemon=True).start()
    server = ThreadingHTTPServer((options.host, options.port), handler(fake))
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
