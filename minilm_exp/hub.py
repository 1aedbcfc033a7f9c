"""Commits of the hub's repositories, so that all that is read of one is of one commit."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

COMMIT = re.compile(r"[0-9a-f]{40}")
# A file that nearly every repository has; a copy of it from an earlier download names the commit.
_FILES = {"model": "config.json", "dataset": "README.md"}


@functools.cache
def hub_commit(hub_id: str, revision: str | None, kind: str) -> str:
    """The commit behind a revision; offline, that of an earlier download. Asked once a process.

    Args:
        hub_id: Name of the repository.
        revision: Branch, tag or commit; None is the main branch.
        kind: model or dataset.

    Raises:
        Exception: The hub does not answer or does not have it, and nothing was downloaded. The
            client has many kinds of error for that; callers say what to do instead.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    file: dict[str, Any] = {"filename": _FILES[kind], "revision": revision, "repo_type": kind}
    try:
        commit = HfApi().repo_info(hub_id, revision=revision, repo_type=kind, timeout=10).sha
    except Exception:
        cached = try_to_load_from_cache(hub_id, **file)
        if not isinstance(cached, str):
            raise
        return Path(cached).parent.name
    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(hub_id, **file)  # leaves behind what answers the question offline
    return str(commit)


def pinned_commit(hub_id: str, revision: str | None, kind: str) -> str | None:
    """The commit behind a revision, without asking where it is one; None for a folder here.

    Raises:
        Exception: As `hub_commit`.
    """
    if Path(hub_id).expanduser().is_dir():
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    return hub_commit(hub_id, revision, kind)
