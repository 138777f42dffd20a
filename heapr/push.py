"""Uploads a checkpoint to the Hugging Face hub.

In: a checkpoint's folder and a hub id. Out: a repository there, private unless asked otherwise. What can be
refused is refused by `check_destination`, before a run does any work.
"""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from heapr.errors import ConfigError
from heapr.hub import hub_is_reachable
from heapr.words import first_line

logger = logging.getLogger(__name__)

LATER = "or leave it out, and upload the checkpoint later: hf upload <owner/name> <folder>"


def check_destination(hub_id: str, *, is_public: bool) -> None:
    """Check that a checkpoint can be uploaded; nothing is created.

    Args:
        hub_id: owner/name.
        is_public: whether everybody may see it.

    Raises:
        ConfigError: the id is not one, the hub cannot be reached or knows no such user, the repository would
            belong to someone else, or is public against the user's wish.
    """
    what = f"pruning.push_to='{hub_id}'"
    _check_id(hub_id, what)
    endpoint = huggingface_hub.constants.ENDPOINT
    if not hub_is_reachable():
        reason = f"{endpoint} does not answer"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        raise ConfigError(f"{what}: the hub cannot be reached ({reason}); run where it can, {LATER}")
    api = HfApi(endpoint=endpoint)
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"{what}: nobody is logged in; run hf auth login or set HF_TOKEN, {LATER}")
    try:
        user = api.whoami()
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
        is_seen_by_all = _is_public(api, hub_id)
    except Exception as error:  # also of the HTTP client that the hub's library uses
        raise ConfigError(f"{what}: the hub refuses: {first_line(error)}; log in anew, {LATER}") from error
    owner = hub_id.partition("/")[0]
    if owner not in owners:
        raise ConfigError(
            f"{what}: '{owner}' is not among the owners that this login writes for ({', '.join(owners)});"
            " give one of them"
        )
    if is_seen_by_all and not is_public:
        raise ConfigError(
            f"{what}: this repository is there already, and everybody sees it; give pruning.push_public=true,"
            " or another name"
        )


def push(checkpoint: Path, hub_id: str, *, is_public: bool) -> str:
    """Upload a checkpoint with its card; what the repository holds already is kept in its history.

    Returns:
        the address of the repository.

    Raises:
        ConfigError: the hub did not take it.
    """
    api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
    try:
        url = api.create_repo(hub_id, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=checkpoint, commit_message="Pruned with heapr")
    except Exception as error:  # also of the HTTP client that the hub's library uses
        raise ConfigError(
            f"the run is finished, but pruning.push_to='{hub_id}' failed: {first_line(error)}; the same"
            f" command uploads the checkpoint again, which is in {checkpoint}"
        ) from error
    logger.info("%-9s checkpoint uploaded to %s", "push", url)
    return str(url)


def _check_id(hub_id: str, what: str) -> None:
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ConfigError(f"{what} is no hub id ({first_line(error)}); give owner/name") from error
    if hub_id.count("/") != 1:
        raise ConfigError(f"{what} is no hub id; give owner/name")


def _is_public(api: HfApi, hub_id: str) -> bool:
    """Whether the repository is there and everybody sees it."""
    try:
        return not api.model_info(hub_id).private
    except RepositoryNotFoundError:
        return False
