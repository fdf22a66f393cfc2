"""A cloud's warning that it takes a spot machine back, read from the machine's metadata service.

On a virtual machine nothing else tells of it: SkyPilot 0.14.1 makes a signal of it on Kubernetes
only, and Slurm sends one by itself. On a machine of no cloud that is known here nothing is asked.

What each cloud promises, and where that is described:
  AWS    two minutes. docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices
         A rebalance recommendation may come earlier, and need not be followed by a notice.
  GCP    up to 30 seconds. cloud.google.com/compute/docs/instances/spot
  Azure  at least 30 seconds. learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

ADDRESS = "http://169.254.169.254"  # of the metadata service in all three clouds
AWS_ADDRESS = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the variable of AWS's own SDKs for another one
DMI = Path("/sys/class/dmi/id")  # what the machine's firmware says of its maker
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"  # Hyper-V elsewhere has the same maker, not this
SECONDS_BETWEEN_POLLS = 5.0
# Seconds. A firewall may drop what is sent, without an answer.
TIMEOUT = 2.0
# Seconds without any answer before that is said. Azure's first answer takes up to two minutes.
PATIENCE = 180.0
LARGEST_ANSWER = 2**20  # bytes

# Called with a method, a path and headers. Returns the answer's text, or None if it is 404; raises
# OSError if there is no answer or another error.
Ask = Callable[[str, str, dict[str, str]], str | None]


class SpotNotice(NamedTuple):
    """What a cloud says of this machine."""

    text: str  # for the log
    is_final: bool  # the machine goes. Otherwise it may: the risk is higher than before


class Cloud(NamedTuple):
    name: str
    read: Callable[[Ask], SpotNotice | None]  # raises OSError or ValueError if it learns nothing


def read_aws(ask: Ask) -> SpotNotice | None:
    """IMDSv2: a session's token first, then both warnings, which are 404 until there is one."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = ask("PUT", "/latest/api/token", lifetime)
    if token is None:
        raise ValueError("no token")
    session = {"X-aws-ec2-metadata-token": token}
    action = ask("GET", "/latest/meta-data/spot/instance-action", session)
    if action is not None:
        notice = json_object(action)
        return SpotNotice(f"{notice['action']} at {notice['time']}", is_final=True)
    recommendation = ask("GET", "/latest/meta-data/events/recommendations/rebalance", session)
    if recommendation is None:
        return None
    since = json_object(recommendation)["noticeTime"]
    return SpotNotice(f"rebalance recommendation of {since}", is_final=False)


def read_gcp(ask: Ask) -> SpotNotice | None:
    preempted = ask("GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if preempted not in ("TRUE", "FALSE"):
        raise ValueError(f"instance/preempted is {preempted!r:.40}")
    return SpotNotice("preempted", is_final=True) if preempted == "TRUE" else None


def read_azure(ask: Ask) -> SpotNotice | None:
    """The events of this machine; those of its neighbours in a group are listed too."""
    header = {"Metadata": "true"}
    answer = ask("GET", "/metadata/scheduledevents?api-version=2020-07-01", header)
    events = json_object(answer or "")["Events"]
    preempts = [event for event in events if event["EventType"] == "Preempt"]
    if not preempts:
        return None
    name = ask("GET", "/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
    for event in preempts:
        if name is None or name in event["Resources"]:
            return SpotNotice(f"Preempt, not before {event['NotBefore'] or 'now'}", is_final=True)
    return None


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError if the text is something else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("the answer is not a JSON object")
    return value


AWS, GCP, AZURE = Cloud("AWS", read_aws), Cloud("GCP", read_gcp), Cloud("Azure", read_azure)


def cloud_of_machine(dmi: Path = DMI) -> Cloud | None:
    """The cloud whose machine this is, as its firmware says, or None. Sends nothing."""

    def says(file: str) -> str:
        try:
            return (dmi / file).read_text().strip()
        except OSError:  # a container, or another kind of machine
            return ""

    if says("chassis_asset_tag") == AZURE_TAG:
        return AZURE
    return {"Amazon EC2": AWS, "Google": GCP}.get(says("sys_vendor"))


def metadata_service(address: str, *, timeout: float = TIMEOUT) -> Ask:
    """Asks the metadata service of this machine. timeout: seconds without a byte of the answer."""
    direct = build_opener(ProxyHandler({}))  # a proxy would answer for its own machine

    def ask(method: str, path: str, headers: dict[str, str]) -> str | None:
        request = Request(address + path, headers=headers, method=method)
        try:
            with direct.open(request, timeout=timeout) as answer:
                text: bytes = answer.read(LARGEST_ANSWER)
        except HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            raise
        return text.decode().strip()

    return ask


class SpotWatch:
    """Asks the cloud again and again, until the machine is taken back.

    on_final: called once, with the machine to go. on_risk: called once, when it may. Both are
    called in the watching thread. seconds: between two polls.
    """

    def __init__(
        self,
        cloud: Cloud,
        *,
        ask: Ask,
        on_final: Callable[[], None],
        on_risk: Callable[[], None],
        seconds: float = SECONDS_BETWEEN_POLLS,
        patience: float = PATIENCE,
    ) -> None:
        self.cloud, self.on_final, self.on_risk = cloud, on_final, on_risk
        self.ask = ask
        self.seconds, self.patience = seconds, patience
        self.answered = time.monotonic()
        self.told_risk = self.told_silence = False

    def start(self) -> None:
        """Watch in a thread of its own, which nothing waits for."""
        threading.Thread(target=self.watch, name="spot notice", daemon=True).start()

    def watch(self) -> None:
        """The thread: return after the final notice."""
        while True:
            notice = self.poll()
            if notice is not None and notice.is_final:
                say(f"{self.cloud.name} takes this machine back: {notice.text}")
                self.on_final()
                return
            if notice is not None and not self.told_risk:
                self.told_risk = True
                say(
                    f"{self.cloud.name} may take this machine back: {notice.text}; "
                    "a checkpoint is saved now, and training goes on"
                )
                self.on_risk()
            time.sleep(self.seconds)

    def poll(self) -> SpotNotice | None:
        """What the cloud says now; None also if it cannot be asked."""
        try:
            notice = self.cloud.read(self.ask)
        except Exception as error:  # whatever is answered, the next answer may be the notice
            silent = time.monotonic() - self.answered
            if silent > self.patience and not self.told_silence:
                self.told_silence = True
                say(
                    f"warning: the metadata service of {self.cloud.name} does not answer "
                    f"({error!r:.200}); if this is a spot machine, it will be taken back without "
                    "a notice"
                )
            return None
        self.answered = time.monotonic()
        return notice


def say(line: str) -> None:
    with suppress(OSError):  # whoever read the log may be gone
        print(line + "\n", end="", flush=True)  # in one write: others write to this log too


def watch_for_spot_notice(*, on_final: Callable[[], None], on_risk: Callable[[], None]) -> None:
    """Start a SpotWatch on the first rank of a node, if the node is a cloud's machine."""
    cloud = cloud_of_machine()
    if cloud is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    address = os.environ.get(AWS_ADDRESS, ADDRESS) if cloud is AWS else ADDRESS
    SpotWatch(cloud, ask=metadata_service(address), on_final=on_final, on_risk=on_risk).start()
