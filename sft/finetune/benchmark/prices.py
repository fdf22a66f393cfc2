"""What clouds ask for machines with these GPUs, from SkyPilot's catalog, as JSON.

    .venv/sky/bin/python sft/finetune/benchmark/prices.py --clouds aws gcp -- H100:2 H100:8

The only file that runs in SkyPilot's environment (`make sky`), so it imports nothing of finetune;
quote.py runs it. SkyPilot downloads a cloud's catalog when its own copy is older than some hours,
and goes on with the old copy where it cannot. Needs neither an account nor SkyPilot's server.

Prints {"offers": [...], "failed": {cloud: reason}}. An offer is the cheapest region of a cloud:
    {"cloud", "accelerators", "instance_type", "region", "price", "spot_region", "spot_price"}
with prices in dollars an hour for one node, or null where the catalog has none.
"""

import argparse
import json
import logging
import math
import sys
from contextlib import redirect_stdout
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("accelerators", nargs="+", help="GPUs of one node, for example H100:8")
    parser.add_argument("--clouds", nargs="+", required=True)
    args = parser.parse_args()
    offers, failed = [], {}
    with redirect_stdout(sys.stderr):  # SkyPilot prints its progress
        for cloud in args.clouds:
            try:
                offers += [
                    offer
                    for accelerators in args.accelerators
                    if (offer := cheapest(cloud, accelerators)) is not None
                ]
            # Each cloud's catalog fails in its own way: offline, not published, unknown name.
            except Exception as error:
                failed[cloud] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    print(json.dumps({"offers": offers, "failed": failed}))


def cheapest(cloud: str, accelerators: str) -> dict[str, Any] | None:
    """The cloud's cheapest node with exactly these GPUs, or None if it rents none."""
    # Imported here, because it takes a second: a mistake in the flags needs no SkyPilot.
    from sky import catalog  # type: ignore[attr-defined]

    name, _, count = accelerators.partition(":")
    found = catalog.list_accelerators(
        name_filter=f"^{name}$",
        quantity_filter=int(count or 1),
        clouds=[cloud],
        all_regions=True,
    )
    nodes = [node for group in found.values() for node in group]
    priced = [node for node in nodes if is_price(node.price)]
    spot = [node for node in nodes if is_price(node.spot_price)]
    if not nodes:
        return None
    node = min(priced, key=lambda node: node.price, default=nodes[0])
    spot_node = min(spot, key=lambda node: node.spot_price, default=None)
    return {
        "cloud": cloud,
        "accelerators": accelerators,
        "instance_type": node.instance_type,
        "region": node.region,
        "price": node.price if priced else None,
        "spot_region": spot_node.region if spot_node else None,
        "spot_price": spot_node.spot_price if spot_node else None,
    }


def is_price(value: float) -> bool:
    """Whether it is one: the catalog leaves a cell empty (NaN) or zero where it knows none."""
    return not math.isnan(value) and value > 0


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # of a cloud that cannot be asked, `failed` says why
    main()
