"""The manifests are ones that Kubernetes' own schema takes, strictly, and say what the config says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config import load_config
from protocols.link_keys import read_buffer_keys, read_worker_keys
from workers.kubernetes import manifests

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ["quickstart.toml", "quickstart-sft.toml", "dapo-qwen2.5-32b.toml"]
IMAGE = 'placement.kubernetes.image="registry.example/headrace:1"'
VERSION = "1.31"


def made(name: str, *overrides: str) -> dict[str, list[dict]]:
    path = ROOT / "configs" / name
    keys = dict.fromkeys(("buffer", "generator", "reward", "learner", "observer"), "secret")
    config = load_config(path, [IMAGE, *overrides])
    return manifests(config, path.read_text(), [IMAGE, *overrides], keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_kubernetes_own_schema_takes_them(name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    found = [each for file in made(name).values() for each in file]
    assert {each["kind"] for each in found} == {"PersistentVolumeClaim", "ConfigMap", "Secret", "Service", "Job"}
    for each in found:
        read = yaml.safe_load(yaml.safe_dump(each))
        assert read == each
        kubernetes_validate.validate(read, VERSION, strict=True)


def test_the_schema_would_refuse_what_is_wrong() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    (job,) = made("quickstart.toml")["learner"]
    job["spec"]["completion"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


def test_a_learner_over_several_nodes() -> None:
    (job,) = made(
        "quickstart.toml",
        "learner.ranks=16",
        "placement.learner={nodes=2,gpus=1,cpus=3,memory_gb=10}",
        "learner.device=cuda",
    )["learner"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "24", "memory": "81920Mi"}, "limits": {"memory": "81920Mi", "nvidia.com/gpu": "8"},
    }  # fmt: skip
    command = " ".join(container["command"])
    assert "--nnodes 2" in command
    assert "--master-addr quickstart-learner-0.quickstart-learner --master-port 29400" in command
    assert command.endswith("--join tcp://quickstart-buffer.default:5555")
    assert "[ ! -e runs/quickstart/checkpoints/step-000240 ]" in command
    assert {env["name"] for env in container["env"]} == {"OMP_NUM_THREADS", "PET_NODE_RANK"}


@pytest.mark.parametrize(("ends", "complete", "code"), [(0, True, 0), (0, False, 75), (2, False, 2), (1, True, 1)])
def test_a_worker_that_leaves_an_incomplete_run_has_failed(
    tmp_path: Path, ends: int, complete: bool, code: int
) -> None:
    (job,) = made("quickstart.toml", f"runs={tmp_path}", "steps=3")["generator"]
    script = job["spec"]["template"]["spec"]["containers"][0]["command"][:4]
    if complete:
        (tmp_path / "quickstart" / "checkpoints" / "step-000003").mkdir(parents=True)
    done = subprocess.run(
        [*script, "bash", "-c", f"exit {ends}"], timeout=60, env={"JOB_COMPLETION_INDEX": "0", "PATH": "/bin"}
    )
    assert done.returncode == code


def test_a_pod_sees_the_key_of_its_role_alone() -> None:
    for role in ("buffer", "learner", "generator", "reward"):
        (job,) = made("quickstart.toml")[role]
        secrets = [v["secret"] for v in job["spec"]["template"]["spec"]["volumes"] if "secret" in v]
        assert secrets == [{"secretName": f"quickstart-key-{role}", "defaultMode": 0o400}]


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_writes_files_and_keys_that_belong_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = headrace("manifests", "configs/quickstart.toml", str(out), "--set", IMAGE)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.glob("*.yaml")) == [
        "buffer.yaml", "config.yaml", "generator.yaml", "learner.yaml", "reward.yaml", "secrets.yaml", "services.yaml",
        "volume.yaml",
    ]  # fmt: skip
    assert (out / "secrets.yaml").stat().st_mode & 0o077 == 0
    secrets = {s["metadata"]["name"]: s["stringData"] for s in yaml.safe_load_all((out / "secrets.yaml").read_text())}
    assert secrets["quickstart-key-reward"] == {"reward.key": (out / "keys" / "reward.key").read_text()}
    assert read_worker_keys(out / "keys", "reward").buffer == read_buffer_keys(out / "keys").public


def test_without_an_image_it_is_refused(tmp_path: Path) -> None:
    done = headrace("manifests", "configs/quickstart.toml", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "placement.kubernetes.image" in done.stderr
    assert not (tmp_path / "out").exists()
