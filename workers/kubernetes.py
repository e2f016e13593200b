"""A run as manifests for Kubernetes: functions of its config, and of keys that were made before.

One Job a role. A Job puts the pod of a lost node on another one by itself; exit code 2, input that cannot be used, fails it
at once. The volume is the working directory of every pod, so a config's paths are paths in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.config import Config, ConfigError, NewModel, UtelModel
from engine.config_placement import Resources
from protocols.link_keys import make_keys
from workers.contradictions_placement import refuse_placement
from workers.roles import Rendezvous, role_threads, torchrun
from workers.slurm_script import learner_nodes

Manifest = dict[str, Any]
WORK, KEYS, CONFIG = "/work", "/keys", "/config"
AGAIN = 75
"""Exit code of a worker that was sent away before the run was complete."""
ATTEMPTS = 20
"""Pods of a role that may fail before its Job does."""


def render(config: Config, path: str, overrides: Sequence[str], folder: Path) -> list[Path]:
    """Writes `folder`/NAME.yaml, to be applied with `kubectl apply -f FOLDER`, and the run's keys in `folder`/keys; files that
    hold keys are private. Raises `ConfigError` for what cannot be placed, and where the folder holds keys already."""
    refuse_placement(config, "kubernetes")
    folder.mkdir(parents=True, exist_ok=True)
    keys = {file.stem: file.read_text(encoding="utf-8") for file in make_keys(folder / "keys")}
    text = Path(path).read_text(encoding="utf-8")
    written = []
    for name, found in manifests(config, text, overrides, keys).items():
        file = folder / f"{name}.yaml"
        file.touch(mode=0o600 if name == "secrets" else 0o644)
        file.write_text(yaml.safe_dump_all(found, sort_keys=False), encoding="utf-8")
        written.append(file)
    return written


def manifests(config: Config, text: str, overrides: Sequence[str], keys: dict[str, str]) -> dict[str, list[Manifest]]:
    """By the name of the file they go to. `text` is the config's file, `keys` are key files by role."""
    sets = [*overrides, f'buffer.keys="{KEYS}"', f'buffer.address="tcp://0.0.0.0:{config.placement.kubernetes.port}"']
    arguments = [f"{CONFIG}/config.toml", *(word for each in sets for word in ("--set", each))]
    place = config.placement.kubernetes
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": place.storage}}}
    claim |= {"storageClassName": place.storage_class} if place.storage_class is not None else {}
    volume = _manifest("v1", "PersistentVolumeClaim", config, {"spec": claim})
    volume["metadata"]["name"] = place.claim
    made = {
        "volume": [volume],
        "config": [_manifest("v1", "ConfigMap", config, {"data": {"config.toml": text}}, "config")],
        "secrets": [
            _manifest("v1", "Secret", config, {"type": "Opaque", "stringData": {f"{role}.key": key}}, f"key-{role}")
            for role, key in keys.items()
        ],
        "services": [
            _service(config, "buffer", place.port),
            _service(config, "learner", config.placement.learner.port),
        ],
        "buffer": [_buffer(config, arguments)],
        "learner": [_learner(config, arguments)],
    }
    if config.generates and config.generator is not None:
        made["generator"] = [_workers(config, "generator", config.generator.count, arguments)]
        made["reward"] = [_workers(config, "reward", config.reward.count, arguments)]
    return made


def object_name(config: Config) -> str:
    """The run's name as Kubernetes allows it in names of its objects. Raises `ConfigError` where nothing of it is left."""
    name = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:40].strip("-")
    if not name or not name[0].isalpha():
        raise ConfigError(f"{config.source}: name = {config.name!r}: Kubernetes wants a name that begins with a letter")
    return name


# --- roles -----------------------------------------------------------------------------------------------------------


def _buffer(config: Config, arguments: list[str]) -> Manifest:
    """Continues the run that it finds; a fresh model is made before it starts."""
    log = shlex.quote(str(config.run_dir / "rollouts.db"))
    start = f'[ -e {log} ] && set -- "$@" --resume; exec headrace buffer "$@"'
    pod = _pod(config, "buffer", ["bash", "-c", start, "buffer", *arguments])
    fresh = isinstance(config.model, UtelModel) or (isinstance(config.model, NewModel) and not config.cold_start)
    if fresh:
        model = shlex.quote(str(config.run_dir / "model" / "config.json"))
        made = f'[ -e {model} ] || exec headrace model "$@"'
        pod["initContainers"] = [
            {**pod["containers"][0], "name": "model", "command": ["bash", "-c", made, "model", *arguments]}
        ]
    return _job(config, "buffer", pod, 1)


def _learner(config: Config, arguments: list[str]) -> Manifest:
    """A pod for each node of ranks; the first is reached by its name, through the Service."""
    nodes = learner_nodes(config)
    name = object_name(config)
    role = ["learner", *arguments, "--join", _address(config)]
    command = ["headrace", *role]
    if config.learner.ranks > 1:
        first = f"{name}-learner-0.{name}-learner:{config.placement.learner.port}"
        command = [
            "python3",
            *torchrun(config.learner.ranks, Rendezvous(nodes, first, name))[1:],
            "-m",
            "workers.cli",
            *role,
        ]
    pod = _pod(config, "learner", _until_complete(config, command), times=config.learner.ranks // nodes)
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    pod["containers"][0]["env"].append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": index}})
    pod["subdomain"] = f"{name}-learner"
    return _job(config, "learner", pod, nodes)


def _workers(config: Config, role: str, count: int, arguments: list[str]) -> Manifest:
    command = ["headrace", role, *arguments, "--join", _address(config)]
    pod = _pod(config, role, _until_complete(config, command, f'--name "{role}-$JOB_COMPLETION_INDEX"'))
    return _job(config, role, pod, count)


def _until_complete(config: Config, command: list[str], options: str = "") -> list[str]:
    """A worker leaves with 0 when a buffer that is moved to another node says goodbye, too; that must not complete its Job."""
    last = shlex.quote(str(config.run_dir / "checkpoints" / f"step-{config.steps:06d}"))
    # In the background, for a shell hears no SIGTERM while it waits for a child before it; then once more for its end.
    wait = "& wait $!; code=$?; if [ $code = 143 ]; then wait $!; code=$?; fi"
    script = f'"$@" {options} {wait}; if [ $code = 0 ] && [ ! -e {last} ]; then exit {AGAIN}; fi; exit $code'
    return ["bash", "-c", f"trap 'kill -TERM $!' TERM; {script}", "headrace", *command]


def _pod(config: Config, role: str, command: list[str], times: int = 1) -> Manifest:
    """With what `times` processes of the role need."""
    place, each = config.placement.kubernetes, getattr(config.placement, role)
    name = object_name(config)
    container = {
        "name": role,
        "image": place.image,
        "command": command,
        "workingDir": WORK,
        "env": [{"name": "OMP_NUM_THREADS", "value": str(role_threads(role, config))}],
        "resources": _resources(each, times),
        "volumeMounts": [
            {"name": "work", "mountPath": WORK},
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "keys", "mountPath": KEYS, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    secret = {"secretName": f"{name}-key-{role}", "defaultMode": 0o400}
    pod: Manifest = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": place.claim}},
            {"name": "config", "configMap": {"name": f"{name}-config"}},
            {"name": "keys", "secret": secret},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if selector := place.node_selector.get(role):  # type: ignore[call-overload]
        pod["nodeSelector"] = dict(selector)
    return pod


def _resources(each: Resources, times: int) -> Manifest:
    requests: Manifest = {"cpu": str(each.cpus * times)}
    limits: Manifest = {}
    if each.memory_gb is not None:
        requests["memory"] = limits["memory"] = f"{round(each.memory_gb * 1024 * times)}Mi"
    if each.gpus:
        limits["nvidia.com/gpu"] = str(each.gpus * times)
    return {"requests": requests} | ({"limits": limits} if limits else {})


# --- objects -----------------------------------------------------------------------------------------------------------


def _job(config: Config, role: str, pod: Manifest, count: int) -> Manifest:
    refused = {"action": "FailJob", "onExitCodes": {"containerName": role, "operator": "In", "values": [2]}}
    lost = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    spec = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": ATTEMPTS,
        "podFailurePolicy": {"rules": [refused, lost]},
        "template": {"metadata": {"labels": _labels(config, role)}, "spec": pod},
    }
    return _manifest("batch/v1", "Job", config, {"spec": spec}, role)


def _service(config: Config, role: str, port: int) -> Manifest:
    """Headless: a name that leads to the pods themselves, ready or not."""
    ports = [{"name": role, "port": port}]
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": _labels(config, role), "ports": ports}
    return _manifest("v1", "Service", config, {"spec": spec}, role)


def _manifest(version: str, kind: str, config: Config, content: Manifest, role: str = "volume") -> Manifest:
    metadata = {
        "name": f"{object_name(config)}-{role}",
        "namespace": config.placement.kubernetes.namespace,
        "labels": _labels(config, role),
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def _labels(config: Config, role: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "headrace",
        "app.kubernetes.io/instance": object_name(config),
        "headrace/role": role,
    }


def _address(config: Config) -> str:
    place = config.placement.kubernetes
    return f"tcp://{object_name(config)}-buffer.{place.namespace}:{place.port}"
