"""The student as a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilm_exp.errors import ExperimentError, reason_of
from minilm_exp.redaction import redact

# Of a kept model's folder, what is this framework's own.
_OWN = ("finetuning_key",)


def check_push(repository: str) -> None:
    """Whether a push can be hoped for: the name, the token and the hub.

    Raises:
        ExperimentError: It cannot.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ExperimentError(
            f"push_to={repository!r:.100} is no name of a repository ({reason_of(error)}): give"
            " ORG/NAME, or leave it out"
        ) from error
    owner, _, name = repository.partition("/")
    if not name:
        raise ExperimentError(f"push_to={repository} names no owner: give ORG/NAME")
    if constants.is_offline_mode():
        raise ExperimentError(
            f"push_to={repository}: HF_HUB_OFFLINE forbids to reach the hub: unset it, or leave"
            " push_to out"
        )
    token = get_token()
    if token is None:
        raise ExperimentError(
            f"push_to={repository} needs a token of the hub: run `hf auth login`, or set HF_TOKEN,"
            " or leave push_to out"
        )
    try:
        user: dict[str, Any] = HfApi().whoami(token=token)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403):
            raise ExperimentError(_unreachable(repository, error)) from error
        raise ExperimentError(
            f"push_to={repository}: the hub does not accept the token (status {status}): run"
            " `hf auth login` again, or set HF_TOKEN to a valid one, or leave push_to out"
        ) from error
    except Exception as error:  # the client has many kinds of error for a hub that does not answer
        raise ExperimentError(_unreachable(repository, error)) from error
    role = (user.get("auth", {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ExperimentError(
            f"push_to={repository}: the token may only read: make one that may write and run `hf"
            " auth login`, or set HF_TOKEN, or leave push_to out"
        )
    owners = [user.get("name"), *(one.get("name") for one in user.get("orgs") or [])]
    if owner not in owners:
        raise ExperimentError(
            f"push_to={repository}: the token belongs to {owners[0]}, which may not write for"
            f" {owner}: use one of {', '.join(map(str, owners))} as ORG, or another token"
        )


def push(repository: str, model: Path, exports: Path | None) -> str:
    """Uploads a model's folder, and exports below exports/, in one commit.

    A repository that is not there is made, and is private; one that is there stays as visible as it
    is.

    Args:
        repository: ORG/NAME.
        model: The folder, with its model card.
        exports: The folder of its exports.

    Returns:
        The address of the commit.

    Raises:
        ExperimentError: The hub refuses, or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = {path.relative_to(model): path for path in model.rglob("*") if path.name not in _OWN}
    if exports is not None:
        files |= {Path("exports") / path.relative_to(exports): path for path in exports.rglob("*")}
    operations = [
        CommitOperationAdd(name.as_posix(), path)
        for name, path in sorted(files.items())
        if path.is_file() and ".partial" not in str(name)
    ]
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.create_commit(
            repository, operations, commit_message="Student distilled with minilm_exp"
        )
    except Exception as error:  # the client has many kinds of error
        raise ExperimentError(
            f"push_to={repository}: the hub did not take it ({redact(reason_of(error))}); the run"
            " is finished, and the same command pushes it again"
        ) from error
    return str(commit.commit_url)


def _unreachable(repository: str, error: Exception) -> str:
    return (
        f"push_to={repository}: the hub cannot be asked ({redact(reason_of(error))}): try again"
        " when it can, or leave push_to out"
    )
