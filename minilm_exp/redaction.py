"""Keeps passwords and tokens out of everything that is written."""

from __future__ import annotations

import os
import re

# Hydra writes a colon in an override with a backslash before it.
_PASSWORD_IN_URI = re.compile(r"(\b[a-z][a-z0-9+.-]*\\*://[^\s/:@\\]*\\*):[^\s/]*@", re.IGNORECASE)
_NAMED_SECRET = re.compile(
    r"((?:token|password|passwd|secret(?:_access)?(?:_key)?|api_?key)\b['\"]?\s*[=:]\s*['\"]?)[^\s&,;'\"]+",
    re.IGNORECASE,
)
_ONLY_USER_IN_URI = re.compile(r"(\b[a-z][a-z0-9+.-]*\\*://)[^\s/:@]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|Bearer )[A-Za-z0-9_.~+/=-]{8,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD",
                     "MLFLOW_TRACKING_TOKEN")  # fmt: skip


def redact(text: str) -> str:
    """The text with secrets in URIs, named secrets and known kinds of token as ***."""
    text = _PASSWORD_IN_URI.sub(r"\1:***@", text)
    text = _NAMED_SECRET.sub(r"\1***", text)
    text = _ONLY_USER_IN_URI.sub(r"\1***@", text)
    text = _TOKEN.sub(r"\1***", text)
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name)
        if value:
            text = text.replace(value, "***")
    return text
