"""A generator on a network of its own is cut off from everything else for longer than its lease, in the middle of its work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults.network import Network
from tools.faults.switch import NoNetwork

ROOT = Path(__file__).parent.parent
ALPHABET = "".join(map(chr, range(0x4E00, 0x4E00 + 1500))) + "0123456789= "
"""So many that random weights seldom draw the stop token: responses take a second, and some are always under way."""
CONFIG = """
name = "cut"
steps = 100000
model = {{ type = "new", alphabet = "{alphabet}", hidden = 32, layers = 1, heads = 2, kv_heads = 1, intermediate = 64, context = 512 }}
objective = {{ type = "dapo" }}
generator = {{ sampling = {{ max_tokens = 300 }}, engine = {{ type = "torch", slots = 8 }}, device = "cpu" }}
learner = {{ lr = 1e-5, token_budget = 8192, checkpoint_every = 10, device = "cpu", peer_timeout_s = 3.0 }}

[buffer]
groups_per_step = 2
samples_per_group = 4
prompt_tokens = 16
max_lag = 3
lease_s = 2.0
heartbeat_s = 0.3

[[tasks]]
type = "jsonl"
path = "{folder}/rows.jsonl"
chat = false
held_out = 0
score = {{ type = "python", function = "tools.faults.coin:score" }}
"""


@pytest.fixture(autouse=True)
def a_network() -> None:
    try:
        with Network():
            pass
    except NoNetwork as error:
        pytest.skip(f"needs network namespaces, which root on Linux may make: {error}")


@pytest.mark.timeout(450)
def test_who_is_cut_off_loses_his_tickets_and_comes_back_with_the_current_weights(tmp_path: Path) -> None:
    """Real processes with keys: launcher, buffer, learner, reward and a generator here, one more generator there. The
    weights' broadcast is cut too. Afterwards the log is audited, and trained again to its hashes."""
    rows = "".join(json.dumps({"prompt": f"{n} =", "answer": "1"}) + "\n" for n in range(4000))
    (tmp_path / "rows.jsonl").write_text(rows)
    config, report = tmp_path / "cut.toml", tmp_path / "chaos.json"
    config.write_text(CONFIG.format(folder=tmp_path, alphabet=ALPHABET), encoding="utf-8")
    command = [
        sys.executable, "-m", "tools.faults", str(config), "--kills", "0", "--cuts", "1", "--cut", "6", "--pause", "0.1",
        "--out", str(tmp_path), "--json", str(report), "--limit", "300", "--recover", "100", "--set", "steps=150",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    found = json.loads(report.read_text())
    assert found["violations"] == []
    (outcome,), (run,) = found["result"]["outcomes"], found["result"]["runs"]
    severed = outcome["severed"]
    assert outcome["fault"]["kind"] == "cut"
    assert severed["held"] > 0, said
    assert severed["reissued"] > 0, said
    assert severed["steps"] > 0, said
    assert severed["refused"] > 0, said
    assert severed["connects"] >= 1, said
    assert severed["current_s"] < 60.0, said
    assert outcome["back_s"] < 60.0, said
    assert run["code"] == 0
    assert "150 steps verified (1 to 150)" in run["verified"]
    assert (tmp_path / "cut-0-1" / "keys" / "generator.key").exists()
