"""A Ray of two nodes on this machine: says its address, kills the second node at any line it is sent, ends
when its input does.
"""

from __future__ import annotations

import sys

from CTSegLogic.files.weights import settle_ray

STORE_BYTES = 80 * 2**20

if __name__ == "__main__":
    settle_ray()
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    second = cluster.add_node(**size)
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
    cluster.shutdown()
