"""What is missing for an upload is named before anything is uploaded."""

from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from finetune.errors import UserError
from finetune.export.hub import check_hub, push
from helpers.hub import TOKEN, FakeHub


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_a_missing_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="needs HF_TOKEN"):
        check_hub("ada/mine", connect=FakeHub().connect)


@pytest.mark.parametrize(
    ("hub", "message"),
    [(FakeHub(offline=True), "cannot be reached"), (FakeHub(role="read"), "may only read")],
)
def test_a_hub_that_cannot_be_written_to_is_refused(
    hub: FakeHub, message: str, token: None
) -> None:
    with pytest.raises(UserError, match=message):
        check_hub("ada/mine", connect=hub.connect)


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [("bob/mine", "cannot write to 'bob', only to ada"), ("mine", "is not OWNER/NAME")],
)
def test_a_repository_of_somebody_else_is_refused(repo_id: str, message: str, token: None) -> None:
    with pytest.raises(UserError, match=message):
        check_hub(repo_id, connect=FakeHub().connect)


def test_a_folder_is_uploaded_to_a_private_repository(tmp_path: Path, token: None) -> None:
    (tmp_path / "README.md").write_text("card")
    hub = FakeHub()
    api = check_hub("ada/mine", connect=hub.connect)
    assert push(api, tmp_path, "ada/mine", private=True) == "https://hub/ada/mine"
    assert hub.calls == [("create", "ada/mine", True), ("upload", "ada/mine", ["README.md"])]


def test_an_interrupted_upload_says_that_it_can_be_repeated(tmp_path: Path) -> None:
    class Interrupted(FakeHub):
        def upload_folder(self, **kwargs: object) -> None:
            raise OfflineModeIsEnabled("offline")

    api = Interrupted().connect(token=TOKEN)
    with pytest.raises(UserError, match="was interrupted .*: call again, .* is complete"):
        push(api, tmp_path, "ada/mine", private=True)


def test_a_public_repository_is_refused_unless_asked_for(tmp_path: Path, token: None) -> None:
    hub = FakeHub(public=("ada/mine",))
    with pytest.raises(UserError, match="ada/mine exists and is public: .* --private false"):
        check_hub("ada/mine", connect=hub.connect)
    with pytest.raises(UserError, match="exists and is public"):  # made public meanwhile
        push(hub.connect(token=TOKEN), tmp_path, "ada/mine", private=True)
    assert not [call for call in hub.calls if call[0] == "upload"]
    api = check_hub("ada/mine", private=False, connect=hub.connect)
    push(api, tmp_path, "ada/mine", private=False)
    assert hub.calls[-1][0] == "upload"
