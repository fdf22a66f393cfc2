"""Credentials in URLs and in the environment are in nothing that is printed or stored."""

import pytest

from finetune.credentials import public_url, without_secrets
from finetune.errors import UserError, one_line_errors


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Algorithm=AWS4&X-Amz-Credential=SECRET&X-Amz-Signature=SECRET",
        "AWSAccessKeyId=SECRET&Signature=SECRET&Expires=1",
        "X-Goog-Credential=SECRET&X-Goog-Signature=SECRET",
        "sv=2022&se=2030&sr=b&sp=r&sig=SECRET",
        "token=SECRET",
        "access_token=SECRET",
        "api_key=SECRET&Key=SECRET",
        "X%2DAmz%2DSignature=SECRET",
    ],
)
def test_secret_parameters_are_left_out(query: str) -> None:
    assert public_url(f"https://h.org/a.jsonl?{query}") == "https://h.org/a.jsonl"
    url = f"https://ada:SECRET@h.org/a.jsonl?versionId=3&{query}#SECRET"
    assert public_url(url) == "https://h.org/a.jsonl?versionId=3"


def test_sources_keep_their_names_and_weights() -> None:
    text = "a.jsonl*2,https://u:SECRET@h/b.jsonl?sig=SECRET*0.5,s3://k/c.jsonl,owner/name:de@train"
    public = "a.jsonl*2,https://h/b.jsonl*0.5,s3://k/c.jsonl,owner/name:de@train"
    assert without_secrets(text) == without_secrets(public) == public
    assert "SECRET" not in without_secrets("https://h/a.jsonl?x=1,https://u:SECRET@h/b?sig=SECRET")


def test_an_error_shows_no_credentials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETSECRET")
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("'https://u:SECRET@h/a.jsonl?sig=SECRET' cannot be read: hf_SECRETSECRET")
    assert capsys.readouterr().err == "error: 'https://h/a.jsonl' cannot be read: <HF_TOKEN>\n"


def test_the_traceback_of_an_unforeseen_error_shows_no_credentials(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also those of the errors that led to it. urllib3 quotes URLs without their host."""
    with pytest.raises(SystemExit) as ended, one_line_errors():
        try:
            raise KeyError("Max retries exceeded with url: /a.jsonl?n=1&X-Amz-Signature=SECRET")
        except KeyError as error:
            raise RuntimeError("403, url='https://u:SECRET@h/a.jsonl?sig=SECRET'") from error
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "RuntimeError: 403, url='https://h/a.jsonl'" in printed
    assert "url: /a.jsonl?n=1&X-Amz-Signature=<hidden>" in printed
    assert "SECRET@" not in printed and "=SECRET" not in printed
