"""A sweep on a local Ray cluster of two workers, one of which is killed after the first result; prints what came."""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from firsttoken.sweeping.axes import axes_of
from firsttoken.sweeping.points import Base
from firsttoken.sweeping.store import Store
from firsttoken.sweeping.sweep import sweep


def main() -> None:
    store = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    killed = []

    def progress(stage: str, done: float, total: float) -> None:
        if done >= 1 and not killed:
            cluster.remove_node(workers[1], allow_graceful=False)
            killed.append(done)

    axes = axes_of(["student.layers=1,2", "prompt=8,16,24"])
    base = Base("smollm2-135m", "systolic-128")
    found = sweep(base, axes, store, engine="ray", progress=progress)
    again = sweep(base, axes, store, engine="ray")
    with Store(store) as kept:
        count = kept.count()
    ttft = [row.result["ttft_ms"] for row in found.rows]
    said = {"killed_after": killed, "computed": found.computed, "again": again.computed, "kept": count, "ttft_ms": ttft}
    print(json.dumps(said))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
