"""Keeps passwords and tokens out of everything that is written."""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

# Hydra writes a colon in an override with a backslash before it. A password may hold slashes, but
# what begins with a port and a slash is an address without one.
_PASSWORD_IN_URI = re.compile(
    r"(\b[a-z][a-z0-9+.-]*\\*://[^\s/:@\\]*\\*):(?:[^\s/]*|(?!\d+\\*/)[^\s@'\"]*)@", re.IGNORECASE
)
_NAMED_SECRET = re.compile(
    r"((?:token|password|passwd|secret(?:_access)?(?:_key)?|api_?key)\b['\"]?\s*[=:]\s*['\"]?)[^\s&,;'\"]+",
    re.IGNORECASE,
)
_ONLY_USER_IN_URI = re.compile(r"(\b[a-z][a-z0-9+.-]*\\*://)[^\s/:@]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|Bearer )[A-Za-z0-9_.~+/=-]{8,}")
_SECRET_VARIABLE = re.compile(
    r"(.*_)?(TOKENS?|\w*(PASSWORD|PASSWD|SECRET|TOKEN|APIKEY|CREDENTIALS?)S?|\w*PASS|KEYS?|PWD)(_.*)?"
)
# Names of places, not secrets themselves; a folder would be cut out of every path.
_PLACE = re.compile(r"(OLD)?PWD|.*_(PATH|DIR|FILE|SOCK|URL|HOME|NAME)", re.IGNORECASE)
# Shorter values would be cut out of ordinary words.
_SHORTEST = 6
_remembered: set[str] = set()


def redact(text: str) -> str:
    """The text with secrets in URIs, named secrets and known kinds of token as ***.

    So are the values, of 6 characters and more, of environment variables whose names say that they
    are secret (TOKEN, PASSWORD, SECRET, KEY, CREDENTIAL), and passwords given to `remember`.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    text = _PASSWORD_IN_URI.sub(r"\1:***@", text)
    text = _NAMED_SECRET.sub(r"\1***", text)
    text = _ONLY_USER_IN_URI.sub(r"\1***@", text)
    return _TOKEN.sub(r"\1***", text)


def redact_all(content: Any) -> Any:
    """Nested data with every text in it redacted."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, dict):
        return {redact_all(name): redact_all(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [redact_all(value) for value in content]
    return content


def remember(uri: Any) -> None:
    """Notes the password of an address, which a library may tell without the rest of it."""
    found = re.match(r"[^:/?#\s]+://[^:/@]*:(.*)@", str(uri))
    if found is not None and len(found[1]) >= _SHORTEST:
        _remembered.add(found[1])


def _secrets() -> list[str]:
    """Every form in which a secret may be written, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and _SECRET_VARIABLE.fullmatch(name.upper())
        and not _PLACE.fullmatch(name)
    }
    plain = values | _remembered | {unquote(value) for value in _remembered}
    plain |= {unquote_plus(value) for value in _remembered}
    forms = plain | {write(value) for value in plain for write in (_quote, quote_plus, _escape)}
    return sorted((form for form in forms if len(form) >= _SHORTEST), key=len, reverse=True)


def _quote(text: str) -> str:
    return quote(text, safe="")


def _escape(text: str) -> str:
    """As in JSON and in Python's own notation."""
    return json.dumps(text)[1:-1]
