"""Upload an export to the hub.

Whatever could make the upload fail is checked before the export begins. The token comes from the
environment variable HF_TOKEN and is never printed.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from finetune.errors import UserError


def check_hub(
    repo_id: str, *, private: bool = True, connect: Callable[..., HfApi] = HfApi
) -> HfApi:
    """Return a client that may write to OWNER/NAME.

    private: whether the upload is to be seen by nobody else. connect: makes the client, from the
    keyword argument `token`. Raises UserError for a name of another form, if the token is missing
    or may not write there, or if the repository exists and is public against what was asked.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--push_to_hub {repo_id!r} is not OWNER/NAME")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("--push_to_hub needs HF_TOKEN: a token with write access, from the hub")
    api = connect(token=token)
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        raise UserError(f"the hub refuses HF_TOKEN ({status(error)}): make a new one") from error
    except (OSError, HTTPError) as error:
        raise UserError(
            "the hub cannot be reached: is this machine online, and HF_HUB_OFFLINE unset? "
            f"({type(error).__name__})"
        ) from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError("HF_TOKEN may only read: make one with write access")
    owner, name = repo_id.split("/")
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"HF_TOKEN cannot write to {owner!r}, only to {', '.join(owners)}; "
            f"--push_to_hub {owners[0]}/{name}"
        )
    check_visibility(api, repo_id, private=private)
    return api


def check_visibility(api: HfApi, repo_id: str, *, private: bool) -> None:
    """Raise UserError if the repository is public already, and that was not asked for."""
    if not private:
        return
    try:
        is_public = api.repo_info(repo_id).private is False
    except RepositoryNotFoundError:
        return  # it will be made, and private
    except (OSError, HTTPError) as error:
        raise UserError(
            f"the hub does not say whether {repo_id} is private ({type(error).__name__}): try again"
        ) from error
    if is_public:
        raise UserError(
            f"{repo_id} exists and is public: everybody would see the upload. Make it private on "
            "the hub, take another name, or upload to it all the same with --private false"
        )


def push(api: HfApi, folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder and return its address. Files that the hub has already are not sent again.

    private: for a repository that is new. Raises UserError if the hub refuses the upload, for
    example for want of space, or if it is interrupted.
    """
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        check_visibility(api, repo_id, private=private)  # it may have changed during the export
        # Names that begin with a dot are those of what an interrupted call has left.
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[".*"])
    except HfHubHTTPError as error:
        reason = error.server_message or status(error)
        raise UserError(f"the hub refuses {repo_id}: {reason}; {folder} is complete") from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"the upload to {repo_id} was interrupted ({type(error).__name__}): "
            f"call again, {folder} is complete"
        ) from error
    return str(address)


def status(error: HfHubHTTPError) -> str:
    return f"HTTP {error.response.status_code}"
