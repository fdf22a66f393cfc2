"""Onto the hub: what is missing is said before a byte is uploaded. The token comes from HF_TOKEN
and is never printed.
"""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from finetune.errors import UserError


def check_hub(repo_id: str) -> HfApi:
    """A client that may write to OWNER/NAME. Raises UserError for what is missing."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--push_to_hub {repo_id!r} is not OWNER/NAME")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("--push_to_hub needs HF_TOKEN: a token with write access, from the hub")
    api = HfApi(token=token)
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
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"HF_TOKEN cannot write to {owner!r}: it is of {', '.join(owners)}; "
            f"--push_to_hub {owners[0]}/{repo_id.split('/')[1]}"
        )
    return api


def push(api: HfApi, folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder, what the hub has already is not sent again. Its address.

    Raises UserError if the hub refuses, for example for want of space.
    """
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[".*"])
    except HfHubHTTPError as error:
        reason = error.server_message or status(error)
        raise UserError(f"the hub refuses {repo_id}: {reason}; {folder} is whole") from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"the upload to {repo_id} was interrupted ({type(error).__name__}): "
            f"call again, {folder} is whole"
        ) from error
    return str(address)


def status(error: HfHubHTTPError) -> str:
    return f"HTTP {error.response.status_code}"
