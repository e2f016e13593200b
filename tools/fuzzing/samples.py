"""A valid message of every kind: what mutation starts from."""

from __future__ import annotations

import numpy as np

from protocols import messages as m
from protocols.codec import encode
from protocols.link_messages import Ack, Announce, Goodbye, Heartbeat, Held, Hello, Status, StatusRequest, Welcome

TOKENS = 12


def samples() -> list[m.Message]:
    """One or two of each kind, small, with every optional part present in one of them."""
    tokens, logprobs = np.arange(TOKENS, dtype=m.INT), np.linspace(-3, 0, TOKENS, dtype=m.FLOAT)
    runs, sampling = [(3, 5), (4, TOKENS - 5)], m.Sampling(max_tokens=64, temperature=0.7, top_p=0.9, top_k=20)
    partial = m.Partial(2, tokens, logprobs, runs)
    two = np.array([1, 1], m.INT)
    batch = m.Batch(
        step=4, groups=np.array([7, 9], m.INT), prompt_lengths=np.array([2, 1], m.INT), prompts=np.arange(3, dtype=m.INT),
        sizes=two, lengths=np.array([5, TOKENS - 5], m.INT), tokens=tokens, logprobs=logprobs, versions=tokens,
        rewards=np.array([1, -1], m.FLOAT), correct=np.array([True, False]), truncated=np.array([False, False]),
    )  # fmt: skip
    announce = Announce("10.0.0.1", 4321, "0123456789abcdef")
    return [
        m.Ticket(7, [0, 1, 2], 5, tokens, sampling, 11, 3, [partial]),
        m.Rollout(7, 1, 5, tokens, logprobs, runs, "stop", "an answer", 1.5e9, 1.6e9),
        m.HandBack(7, 5, [0, 1, 2], [partial, m.Partial(0, tokens[:0], logprobs[:0], [])]),
        m.GradeTask(7, 1, 2, "task", "prompt", "text", '{"answer": 1}', 12, "length"),
        m.Grade(7, 1, 2, "graded", True, 1.0, {"exact": 1.0}, "why", 0.5),
        m.PlanRequest(4),
        m.Plan(4, [m.GroupSize(7, 3, [4, 5])], "ab" * 16, True, {"keep_rate": 0.5}),
        m.Pull(4, [7, 9]),
        batch,
        m.StepCommit(4, "ab" * 16, "code", 1.5e9, 1.6e9, {"loss": 0.1}, {"w": "cd" * 16}),
        announce,
        Heartbeat("decodes", 1.5e9, 3, [Held(7, 5)], {"tokens": 9.0}),
        Hello("generator", "generator-0", "host", 123, 80),
        Welcome("run", 2.0, 4, announce),
        Ack(9, "a reason", 2),
        StatusRequest(),
        Status(
            "run", 4, 9, False, {"in_system": 3.0}, [{"name": "g", "role": "generator"}], {"loss": 0.1}, [{"step": 1.0}]
        ),
        Goodbye("closed"),
    ]


def frames_of_samples() -> list[list[bytes]]:
    return [[bytes(frame) for frame in encode(message, 7)] for message in samples()]
