"""A verified export -> a repository of the hub, where it was asked for by name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from likely.errors import ConfigError, ResourceError, first_line

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
TOKEN = "HF_TOKEN"  # noqa: S105  (the name of a variable)


def require_token(repository: str) -> str:
    """The token of the environment; it is passed on with each request and written nowhere.

    Raises:
        ConfigError: there is none, or the repository's name is none.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{repository!r} is no name of a repository", place="--push", way_out="write ORG/NAME")
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise ConfigError(
            f"{TOKEN} is not set, so nothing may be pushed", place="--push", way_out=f"export {TOKEN}=..."
        )
    return token


def push(folder: Path, repository: str, token: str) -> str:
    """Upload a folder to a model repository, which is made, for its owner's eyes only, where there is none.

    Returns:
        The address of the commit.

    Raises:
        ResourceError: the hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (half a second that only this needs)

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by likely")
    except Exception as error:  # network, permissions: each with a class of its own
        raise ResourceError(
            f"not pushed: {first_line(error).replace(token, '***')}",
            place=repository,
            way_out=f"the export itself is whole in {folder}: check the token's rights and the network",
        ) from error
    return str(done.commit_url)
