"""Keeps passwords and tokens out of everything that is written."""

from __future__ import annotations

import os
import re

# Hydra writes a colon in an override with a backslash before it.
_PASSWORD_IN_URI = re.compile(r"(\b[a-z][a-z0-9+.-]*\\*://[^\s/:@\\]*\\*):[^\s/]*@", re.IGNORECASE)
_NAMED_SECRET = re.compile(
    r"((?:token|password|passwd|secret|api_?key)\b['\"]?\s*[=:]\s*['\"]?)[^\s&,;'\"]+",
    re.IGNORECASE,
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD",
                     "MLFLOW_TRACKING_TOKEN")  # fmt: skip


def redact(text: str) -> str:
    """The text with passwords in URIs, named secrets and hub tokens replaced by ***."""
    text = _PASSWORD_IN_URI.sub(r"\1:***@", text)
    text = _NAMED_SECRET.sub(r"\1***", text)
    text = _HUB_TOKEN.sub("hf_***", text)
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name)
        if value:
            text = text.replace(value, "***")
    return text
