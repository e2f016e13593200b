"""Where `headrace launch` puts a run: `--on` as one word."""

from __future__ import annotations

from engine.config import Config, ConfigError, load_config
from workers.contradictions_placement import refuse_placement
from workers.launch import launch
from workers.site import Site
from workers.slurm import launch_on_slurm
from workers.slurm_allocation import SlurmAllocation

PLACES = ("here", "slurm", "allocation", "ray")


def launch_on(place: str, path: str, overrides: list[str], *, resume: bool, live: bool) -> int:
    """The run's exit code. Raises as `launch.launch` does."""
    match place:
        case "here":
            return launch(path, overrides, resume=resume, live=live)
        case "slurm":
            return launch_on_slurm(path, overrides, resume=resume)
        case "ray":
            config = load_config(path, overrides)
            refuse_placement(config, "ray")
            return launch(path, overrides, resume=resume, live=live, site=_ray(config))
        case "allocation":
            config = load_config(path, overrides)
            refuse_placement(config, "slurm")
            return launch(path, overrides, resume=resume, live=live, site=SlurmAllocation(config))
    raise ConfigError(f"--on {place}: expected one of {', '.join(PLACES)}")


def _ray(config: Config) -> Site:
    try:
        from workers.ray_cluster import RayCluster
    except ImportError as error:
        raise ConfigError(f"--on ray: {error}; install it with: pip install -e '.[ray]'") from error
    return RayCluster(config)
