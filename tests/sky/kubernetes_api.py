"""A Kubernetes cluster, as far as SkyPilot's optimizer asks: an API server that lists its nodes.

The nodes are those of catalogs/kubernetes/nodes.json, labelled as NVIDIA's GPU operator does.
"""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

NODES = Path(__file__).parent / "catalogs/kubernetes/nodes.json"


def node(
    name: str, *, gpu: str, gpus: int, cpus: int, memory_gib: int, disk_gib: int
) -> dict[str, Any]:
    """A node as the API server lists it, idle."""
    resources = {
        "cpu": str(cpus),
        "memory": f"{memory_gib}Gi",
        "ephemeral-storage": f"{disk_gib}Gi",
        "nvidia.com/gpu": str(gpus),
        "pods": "110",
    }
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": gpu}},
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


class ApiServer(http.server.BaseHTTPRequestHandler):
    """Answers `list nodes`; of whatever else is listed there is nothing."""

    def do_GET(self) -> None:
        is_nodes = self.path.partition("?")[0] == "/api/v1/nodes"
        items = [node(**entry) for entry in json.loads(NODES.read_text())] if is_nodes else []
        content = json.dumps({"apiVersion": "v1", "kind": "List", "items": items}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def cluster(home: Path) -> Iterator[None]:
    """Serve the cluster's API on loopback; HOME's kubeconfig leads to it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ApiServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "cluster",
            "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": "user"}}],
            "clusters": [
                {
                    "name": "cluster",
                    "cluster": {"server": f"http://127.0.0.1:{server.server_port}"},
                }
            ],
            "users": [{"name": "user", "user": {"token": "none"}}],
        }
        (home / ".kube").mkdir()
        (home / ".kube/config").write_text(yaml.safe_dump(config))
        yield
        server.shutdown()
