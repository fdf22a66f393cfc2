"""Lets managed jobs run offline and on a busy machine. On PYTHONPATH inside the lab only.

Before each look at a job SkyPilot's controller asks two public addresses whether the network is up,
and looks no further if they are silent. A job in the lab needs no network but the lab's: SkyPilot's
API server is asked instead.

SkyPilot starts a controller for each few gigabytes of memory. One is enough for the lab's jobs, and
each of the others would cost seconds of CPU.

SkyPilot asks every cluster for its state each minute, with seconds of CPU for each. The tests ask
for themselves what they need to know.

SkyPilot gives its API server 60 seconds to start, and a Slurm job as many to end: a busy machine
exceeds them.
"""

from importlib.machinery import SourceFileLoader
from types import ModuleType

exec_module = SourceFileLoader.exec_module
CHANGES = {
    "sky.backends.backend_utils": {"_TEST_IP_LIST": ["http://127.0.0.1:46580"]},
    "sky.utils.controller_utils": {"MAX_CONTROLLERS": 1},
    "sky.server.constants": {"CLUSTER_REFRESH_DAEMON_INTERVAL_SECONDS": 600},
    "sky.server.common": {"WAIT_APISERVER_START_TIMEOUT_SEC": 600},
    "sky.provision.slurm.instance": {"_JOB_TERMINATION_TIMEOUT_SECONDS": 600},
}


def exec_and_change(self: SourceFileLoader, module: ModuleType) -> None:
    exec_module(self, module)
    vars(module).update(CHANGES.get(module.__name__, {}))


SourceFileLoader.exec_module = exec_and_change  # type: ignore[assignment, method-assign]
