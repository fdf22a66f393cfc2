"""What SkyPilot's own optimizer chooses for the recipes on one cloud, with the catalogs of tests.

    HOME=<a folder with .sky/catalogs/v8> python tests/sky/choices.py [--network-tier TIER] CLOUD...

Prints one JSON object a line: the cloud, the recipe, and the machine, or why there is none. It is a
process of its own because SkyPilot reads HOME and the catalogs when it is imported.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from sky.clouds import CloudCapability

import sky
from sky import check, exceptions, global_user_state, optimizer

REPO = Path(__file__).resolve().parents[2]
WORKSPACE = "default"


def enable(cloud: str) -> None:
    """Have SkyPilot believe that `sky check` has found this cloud's keys, and no other's."""
    allowed = check._get_workspace_allowed_clouds(WORKSPACE)  # else it would check all anew
    global_user_state.set_allowed_clouds(allowed, WORKSPACE)
    global_user_state.set_enabled_clouds([cloud], CloudCapability.COMPUTE, WORKSPACE)


def choice(path: Path, cloud: str, network_tier: str | None) -> dict[str, Any]:
    """network_tier: replaces the recipe's, as that option of `sky launch` does."""
    config = yaml.safe_load(path.read_text())
    del config["file_mounts"]  # looking for the bucket needs the cloud's keys
    task = sky.Task.from_yaml_config(config, env_overrides=[("CHECKPOINT_BUCKET", "")])
    if network_tier is not None:
        task.set_resources_override({"network_tier": network_tier})
    with sky.Dag() as dag:
        dag.add(task)
    try:
        optimizer.Optimizer.optimize(dag, quiet=True)
    except exceptions.ResourcesUnavailableError as error:
        return {"cloud": cloud, "recipe": path.stem, "error": str(error)}
    best = task.best_resources
    assert best is not None and best.accelerators is not None
    ((gpu, count),) = best.accelerators.items()
    return {
        "cloud": cloud,
        "recipe": path.stem,
        "machine": best.instance_type,
        "gpus": f"{gpu}:{count:.0f}",
        "dollars_per_hour": round(task.num_nodes * best.get_cost(3600), 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--network-tier")
    parser.add_argument("clouds", nargs="+")
    args = parser.parse_args()
    for cloud in args.clouds:
        enable(cloud)
        for path in sorted(REPO.glob("*.yaml")):
            print(json.dumps(choice(path, cloud, args.network_tier)), flush=True)
