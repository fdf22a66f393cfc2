"""Lets managed jobs run offline. On PYTHONPATH inside the lab only.

Before each look at a job SkyPilot's controller asks two public addresses whether the network is up,
and looks no further if they are silent. A job in the lab needs no network but the lab's: SkyPilot's
API server is asked instead.
"""

from importlib.machinery import SourceFileLoader
from types import ModuleType

exec_module = SourceFileLoader.exec_module


def exec_with_address(self: SourceFileLoader, module: ModuleType) -> None:
    exec_module(self, module)
    if module.__name__ == "sky.backends.backend_utils":
        vars(module)["_TEST_IP_LIST"][:] = ["http://127.0.0.1:46580"]


SourceFileLoader.exec_module = exec_with_address  # type: ignore[assignment, method-assign]
