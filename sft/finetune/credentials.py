"""Keeps credentials out of whatever is printed or stored: those in URLs, and those of this machine.

A URL may hold a password before its host, and its query may be signed, as those of AWS, Google and
Azure are. Only the download needs them.
"""

import os
import re
from urllib.parse import unquote_plus

SCHEME = "[a-zA-Z][a-zA-Z0-9+.-]*://"
# In a list of sources the next URL begins after a comma, and a weight may follow each.
URL = re.compile(rf"({SCHEME}(?:(?!,{SCHEME})[^\s'\"<>|])+?)(\*[\d.]+)?(?=,{SCHEME}|[\s'\"<>|]|$)")
USER = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#]*@")
# Parameters of a query. AWS signs with X-Amz-*, or AWSAccessKeyId, Signature and Expires; Google
# with X-Goog-* or GoogleAccessId; Azure's SAS with sig and its terms, all of two or three letters.
SECRET = re.compile(
    r"x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|key-pair-id|policy"
    r"|sig|sv|se|st|sp|sr|spr|ss|srt|sip|si|skoid|sktid|skt|ske|sks|skv|sdd|saoid|suoid|scid"
    r"|.*(token|secret|passw|credential|auth|jwt|session).*|pwd|pass|code|.*key|key.*|hmac",
    re.IGNORECASE,
)
# Of a query, also where an error quotes a URL without its scheme and host, as urllib3's do.
PARAMETER = re.compile(r"([?&;])([^=?&;\s'\"]+)=[^?&;\s'\"<>|]+")
SECRET_ENVS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST = 8  # characters; a shorter value would be found in ordinary words


def public_url(url: str) -> str:
    """The URL without user, password, fragment and the secret parameters of its query."""
    url = USER.sub(r"\1", url).partition("#")[0]
    address, question, query = url.partition("?")
    kept = [part for part in re.split("[&;]", query) if part and not is_secret(part)]
    return address + (question + "&".join(kept) if kept else "")


def is_secret(parameter: str) -> bool:
    return SECRET.fullmatch(unquote_plus(parameter.partition("=")[0]).strip()) is not None


def without_secrets(text: str) -> str:
    """The text with its URLs made public, and without the values of SECRET_ENVS."""
    for name in SECRET_ENVS:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, f"<{name}>")
    text = URL.sub(lambda match: public_url(match[1]) + (match[2] or ""), text)
    return PARAMETER.sub(hidden, text)


def hidden(match: re.Match[str]) -> str:
    """A match of PARAMETER without its value, if that is secret."""
    return f"{match[1]}{match[2]}=<hidden>" if is_secret(match[2]) else match[0]
