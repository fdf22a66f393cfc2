"""A stand-in for the hub's client, which notes what it is asked to do, and for the hub's cache."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

TOKEN = "hf_" + "x" * 34
COMMIT = "c" * 40


def put_in_cache(model: Path, cache: Path, name: str, *, commit: str = COMMIT) -> Path:
    """Put a model into a folder that has the form of the hub's cache, as OWNER/NAME at a commit;
    return the folder of its files.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    return shutil.copytree(model, repository / "snapshots" / commit)


class FakeHub:
    """Belongs to the user "ada". role: of the token; offline: whether the hub is out of reach.

    public: names of repositories that exist and everybody can read.
    """

    def __init__(
        self, *, role: str = "write", offline: bool = False, public: tuple[str, ...] = ()
    ) -> None:
        self.role, self.offline = role, offline
        self.private = dict.fromkeys(public, False)  # by repository
        self.calls: list[Any] = []

    def connect(self, *, token: str) -> Any:
        """Make the client, as HfApi(token=...) does."""
        assert token == TOKEN
        return self

    def whoami(self) -> dict[str, Any]:
        if self.offline:
            raise OfflineModeIsEnabled("offline")
        return {"name": "ada", "auth": {"accessToken": {"role": self.role}}, "orgs": []}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", repo_id, private))
        self.private.setdefault(repo_id, private)
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        if repo_id not in self.private:
            request = httpx2.Request("GET", f"https://hub/api/models/{repo_id}")
            raise RepositoryNotFoundError("none", response=httpx2.Response(404, request=request))
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: Any) -> None:
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))
