"""Every wait of the system in one place: how long it may last, who waits for what, and what follows when that is over.

`python -m workers.waits` prints it as a table. A test holds it against the code: a deadline or pause that is not listed here,
or has another value there, fails it, and so does a call that blocks without a limit of its own and has no reason below.
"""

from __future__ import annotations

from msgspec import Struct


class Wait(Struct, frozen=True):
    """`name` is a constant's module and name, or a field's class and name; `seconds` its value (a field's default)."""

    name: str
    seconds: float
    what: str
    then: str


class NoLimit(Struct, frozen=True):
    """A call that blocks and names no limit itself; `why` says what ends it."""

    file: str
    call: str
    why: str


DEADLINES = [
    # --- settings of a run ---
    Wait("BufferConfig.lease_s", 60, "the buffer, for a sign of life of samples that a generator holds", "issued anew"),
    Wait("BufferConfig.heartbeat_s", 2, "both ends of a link, between signs of life", "silent for 5, at least 10 s: it left"),
    Wait("RewardConfig.timeout_s", 10, "a reward worker, for the score of a response", "killed; verdict `timeout`"),
    Wait("LearnerConfig.peer_timeout_s", 60, "learner and generators, for each other in a broadcast", "dropped"),
    Wait("VllmEngine.start_s", 600, "a generator, for vLLM to start", "exit code 1"),
    Wait("VllmEngine.deadline_s", 120, "a generator, for an answer of vLLM", "exit code 1"),
    Wait("SglangEngine.start_s", 600, "a generator, for its SGLang server to start", "exit code 1"),
    Wait("SglangEngine.deadline_s", 120, "a generator, for an answer of SGLang", "server killed; exit code 1"),
    Wait("Pace.lease_s", 60, "the ledger's lease of a sample; `BufferConfig.lease_s` in a run", "issued anew"),
    Wait("Pace.grade_lease_s", 60, "the ledger's lease of a grade; in a run as long as all tasks of a scorer + 30 s", "issued anew"),
    # --- the link and the log ---
    Wait("protocols.link_client.SEND_TIMEOUT_S", 120, "a worker, for room to send", "LinkTimeout"),
    Wait("protocols.link_client.GOODBYE_S", 1, "a worker that closes, for its goodbye to leave", "closes without"),
    Wait("protocols.log_schema.BUSY_S", 30, "SQLite, for another process's lock on the log", "an error"),
    # --- weights ---
    Wait("engine.weights.control.PROBE_S", 5, "a generator, for the learner's port to take a connection", "tries again"),
    Wait("engine.weights.gate.HANDSHAKE_S", 10, "the gate, for a generator's token", "cut off"),
    Wait("Terms.peer_timeout_s", 60, "a learner rank, for a member; `LearnerConfig.peer_timeout_s` in a run", "dropped"),
    Wait("engine.weights.keeper.PUBLISH_S", 3600, "a learner rank, for the first one to publish", "an error"),
    Wait("engine.weights.publisher.GRACE_S", 2, "the learner, beyond peer_timeout_s, for a broadcast to move or to end", "an error"),
    Wait("workers.weight_feed.LEARNER_TIMEOUT_S", 1800, "a generator, without any learner", "exit code 1"),
    # --- SGLang ---
    Wait("engine.generate_sglang_http.CONNECT_S", 5, "a generator, for SGLang to take a connection", "server killed; exit code 1"),
    Wait("engine.generate_sglang_http.CLOSE_S", 5, "a generator that leaves, for its connections to close", "leaves"),
    Wait("engine.generate_sglang_start.VERSION_S", 60, "a generator, for an interpreter to say which SGLang it has", "exit code 2"),
    Wait("engine.generate_sglang_server.END_S", 10, "a generator, for its server to end; at its start, for an answer", "killed; asks on"),
    Wait("engine.generate_sglang_engine.RECALL_S", 10, "a generator, for SGLang's last words about what it aborts", "goes on without"),
    # --- roles ---
    Wait("workers.buffer.GOODBYE_S", 10, "the buffer at the end, for workers to take its goodbye", "ends without them"),
    Wait("workers.generator.JOIN_TIMEOUT_S", 60, "a generator, for the buffer's first welcome", "exit code 1"),
    Wait("workers.generator.GONE_S", 300, "a generator, for a buffer that is gone to come back", "exit code 1"),
    Wait("workers.generator.FLUSH_S", 10, "a generator that leaves, for the buffer to have what it hands back", "leaves; its leases end"),
    Wait("workers.reward.JOIN_TIMEOUT_S", 60, "a reward worker, for the buffer's first welcome", "exit code 1"),
    Wait("workers.reward.GONE_S", 300, "a reward worker, for a buffer that is gone to come back", "exit code 1"),
    Wait("workers.reward.FINISH_S", 5, "a reward worker that leaves, for scores under way, then for their acknowledgement", "leaves"),
    Wait("workers.learner.DATA_TIMEOUT_S", 21600, "the learner, for a step's groups, and for the run's end", "an error"),
    Wait("workers.learner.PULL_TIMEOUT_S", 300, "the learner, for groups that are ready", "an error"),
    Wait("workers.learner.GOODBYE_S", 15, "a learner rank, for the buffer's goodbye when the first rank is gone", "an error"),
    Wait("workers.learner.COMMIT_TIMEOUT_S", 60, "the learner, for its commit to be in the log", "LinkTimeout"),
    Wait("workers.scorer.START_TIMEOUT_S", 120, "a reward worker, for a scorer to have imported its tasks", "an error"),
    Wait("workers.scorer.KILL_TIMEOUT_S", 10, "a reward worker, for a killed scorer to be gone", "goes on without"),
    # --- the launcher, and those who ask ---
    Wait("Patience.model_s", 600, "the launcher, for the model to be made", "an error"),
    Wait("Patience.address_s", 180, "the launcher, for the buffer's address", "an error"),
    Wait("Patience.leave_s", 15, "the launcher, for workers to leave after the end", "ended"),
    Wait("Patience.checkpoint_s", 600, "the launcher, for the learner's last checkpoint", "ended; exit code 1"),
    Wait("Patience.term_s", 15, "the launcher, between SIGTERM and SIGKILL", "killed"),
    Wait("Patience.abandoned_s", 2, "the same when the buffer is gone for good", "killed"),
    Wait("workers.scale.TAKE_S", 20, "`headrace scale`, for the launcher to take its request", "an error; then `--wait`"),
    Wait("workers.slurm_allocation.COMMAND_S", 60, "a launch on Slurm, for one of Slurm's commands", "an error"),
    Wait("workers.slurm_allocation.PLACE_S", 60, "`srun`, for room for a learner or a generator", "counts as an attempt"),
    Wait("workers.slurm_script.WARNING_S", 120, "a Slurm job, from SIGTERM to the end of its time", "ended by Slurm"),
    Wait("workers.slurm.SILENT_S", 600, "`launch --on slurm`, for Slurm to say how the job stands", "an error; the job goes on"),
    Wait("workers.slurm.CANCEL_S", 90, "the same, for a job that was told to end in order", "cancelled"),
    Wait("workers.ray_cluster.PLACE_S", 120, "a launch on Ray, for room and an actor for a process", "counts as an attempt"),
    Wait("workers.ray_actor.LOOK_S", 60, "the same, for a node to look for the run's folder", "an error"),
    Wait("workers.ray_cluster.ANSWER_S", 30, "the same, for an actor's answer", "started anew"),
    Wait("workers.view.ASK_TIMEOUT_S", 2, "`headrace status`, for the buffer", "says what the log has"),
    Wait("workers.view.QUIET_S", 30, "the view, for anything to move", "says since when nothing has"),
]  # fmt: skip

PAUSES = [
    Wait("protocols.link_server.RETRY_S", 0.01, "the link's server, between attempts at a full socket", "tries again"),
    Wait("protocols.link_thread.CONFIRM_S", 0.05, "the link's client, until it confirms what came", "confirms"),
    Wait("protocols.link_thread.BACKOFF_S", 5, "the link's client, between attempts to reach the buffer, at most", "dials"),
    Wait("engine.weights.control.RETRY_S", 0.2, "a generator, between tries at the learner's port", "tries, up to peer_timeout_s"),
    Wait("engine.weights.publisher.IDLE_POLL_S", 0.02, "the publisher, between looks at its inbox", "looks"),
    Wait("engine.weights.publisher.BUSY_POLL_S", 0.0003, "the same while members are expected to answer", "looks"),
    Wait("engine.weights.keepers.LOOK_S", 0.0003, "the publisher, between looks at what the other ranks say", "looks"),
    Wait("engine.weights.keeper.TELL_S", 1, "a rank that sends, until it says again that bytes move", "says so"),
    Wait("engine.weights.transport.POLL_S", 0.0005, "between looks whether NCCL is done", "looks"),
    Wait("engine.generate_sglang_engine.STEP_S", 0.02, "a generator, for new tokens of SGLang", "looks"),
    Wait("engine.generate_sglang_engine.BEAT_S", 1, "between two questions whether SGLang still answers", "asks"),
    Wait("engine.generate_sglang_engine.ABORT_AGAIN_S", 0.5, "a generator, until it repeats an abort", "repeats it"),
    Wait("engine.generate_sglang_server.READY_POLL_S", 0.25, "between looks whether SGLang is ready", "looks"),
    Wait("workers.buffer.TURN_S", 0.02, "the buffer, for an event", "looks at leases and plans"),
    Wait("workers.generator.IDLE_S", 0.02, "a generator with nothing to decode, for a ticket", "looks"),
    Wait("workers.generator.STATUS_S", 0.5, "a generator, between two statuses", "says how it stands"),
    Wait("workers.reward.IDLE_S", 0.5, "a reward worker with nothing to score, for a task", "looks"),
    Wait("workers.reward.GRADE_S", 0.02, "the same while it scores", "looks"),
    Wait("workers.reward.STATUS_S", 1, "a reward worker, between two statuses", "says how it stands"),
    Wait("workers.learner.ASK_AGAIN_S", 30, "the learner, until it asks again for what has not come", "asks"),
    Wait("workers.scorer.DEATH_CHECK_S", 0.05, "between looks whether a silent scorer lives", "looks"),
    Wait("workers.scorer_pool.BACKOFF_LIMIT_S", 10, "between attempts to start a scorer, at most", "starts it"),
    Wait("workers.scale.LOOK_S", 0.25, "`headrace scale`, between looks at the workers", "looks"),
    Wait("workers.ray_actor.QUIET_S", 0.2, "an actor, for output of its process", "answers without"),
    Wait("workers.slurm.LOOK_S", 2, "`launch --on slurm`, between two questions to Slurm", "asks"),
    Wait("workers.slurm.READ_S", 0.2, "the same, between two looks at the job's output", "shows it"),
    Wait("workers.view.REFRESH_S", 0.5, "the view, between two pictures", "draws"),
    Wait("workers.replay_progress.TERMINAL_S", 0.2, "a replay's progress on a terminal", "draws"),
    Wait("workers.replay_progress.PLAIN_S", 5, "a replay's progress in a file", "writes a line"),
    Wait("Patience.backoff_s", 1, "the launcher, until it starts a role anew; twice as long each time", "starts it"),
    Wait("Patience.healthy_s", 300, "how long a role must live to have its attempts back", "counts from 0"),
]  # fmt: skip

NO_LIMIT = [
    NoLimit("engine/optimizer.py", "dist.all_reduce(bucket, group=group)",
            "the process group's timeout, 3 x learner.peer_timeout_s + 60 s; in a replay learner.peer_timeout_s"),
    NoLimit("engine/trained_model.py", "dist.all_reduce(tensor, operation, group=self.group)",
            "the same"),
    NoLimit("engine/trained_model.py", "dist.all_gather(everywhere, said.to(device), group=self.group)",
            "the same"),
    NoLimit("engine/leash.py", "command.wait()",
            "a process beside a server, that ends with it; its parent's end or SIGTERM interrupts it"),
    NoLimit("workers/replay.py", "dist.barrier()",
            "the same"),
    NoLimit("engine/weights/transport.py", "work.wait()",
            "gloo: the group's timeout, learner.peer_timeout_s; NCCL: it is done"),
    NoLimit("engine/weights/control.py", "store.queue_pop(queue)",
            "a member's beat thread looks for the store, and wakes it when the member is dropped or closes; so does a keeper's `close`"),
    NoLimit("engine/weights/gate.py", "self._stop.wait()",
            "serves until `close`"),
    NoLimit("engine/weights/gate.py", "asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)",
            "carries bytes until one end closes; both ends have deadlines"),
    NoLimit("workers/scorer_pool.py", "self._changed.wait_for(lambda: self._tasks or self._closed)",
            "a scorer's thread that has nothing to do; nobody waits for it"),
    NoLimit("workers/ranks.py", "subprocess.run(command, env=os.environ | env)",
            "the replay itself in other processes, which have these deadlines"),
]  # fmt: skip


def main() -> None:
    """Prints all of it as Markdown."""
    for title, waits in (("deadline", DEADLINES), ("pause", PAUSES)):
        print(f"| {title} | s | who waits, for what | then |\n|---|---|---|---|")
        for wait in waits:
            print(f"| `{wait.name}` | {wait.seconds:g} | {wait.what} | {wait.then} |")
        print()
    print("| blocks without a limit of its own | what ends it |\n|---|---|")
    for each in NO_LIMIT:
        print(f"| `{each.file}`: `{each.call}` | {each.why} |")


if __name__ == "__main__":
    main()
