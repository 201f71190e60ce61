"""Where a model is: a folder on this machine, or a name under which it can be downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neox.reference.errors import InputError

# EleutherAI's own models may be named without their organization.
SHORT_NAME = re.compile(r"gpt-neox-20b|pythia-[\w.-]+")
FULL_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+")
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".gguf")


def _repository(name: str) -> str | None:
    """The repository that a name means, or None if it can only be a path."""
    if name.endswith(FILE_SUFFIXES):
        return None
    if SHORT_NAME.fullmatch(name):
        return f"EleutherAI/{name}"
    return name if FULL_NAME.fullmatch(name) else None


def _local(folder: Path, revision: str | None) -> Path:
    """A folder, or the one inside it that holds a step of the training."""
    if revision is None:
        return folder
    if not (folder / revision).is_dir():
        raise InputError(f"{folder} has no folder {revision}: a local model's revisions are folders inside it")
    return folder / revision


def _snapshot(repository: str, revision: str | None) -> Path:
    """Safetensors where there are some: most steps of Pythia have only .bin files."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(repository, revision=revision, allow_patterns=["*.json", "pytorch_model*.bin"])
    return folder


@contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """What can go wrong on the way to the Hub, as one line each."""
    from huggingface_hub import constants, errors

    # What the HTTP library of this release of huggingface_hub raises, be it requests, httpx or httpx2.
    from huggingface_hub.errors import HTTPError

    here = f"{repository} is no folder here"
    try:
        yield
    except errors.GatedRepoError as error:
        terms = f"https://huggingface.co/{repository}"
        raise InputError(f"{repository} is gated: accept its terms at {terms}, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{here} and no model on huggingface.co (or a private one: `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision}; Pythia's are step0 to step143000") from error
    except errors.HFValidationError as error:
        raise InputError(f"{here}, and its name cannot be a model's on huggingface.co") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "huggingface.co cannot be reached"
        raise InputError(f"{here}, is not (wholly) in the download cache, and {cause}") from error
    except (OSError, HTTPError) as error:  # a full disk, a proxy that refuses, any other answer of the hub
        reason = " ".join(str(error).split())
        raise InputError(f"{repository} could not be downloaded: {reason}") from error


def _download(repository: str, revision: str | None) -> Path:
    """The folder in the download cache; what is missing there is fetched."""
    with _explained(repository, revision):
        return _snapshot(repository, revision)


def _named_repository(name: str) -> str:
    repository = _repository(name)
    if repository is None:
        raise InputError(f"no such folder: {name!r}; names to download are pythia-70m, gpt-neox-20b, organization/name")
    return repository


def remote_steps(name: str) -> list[str]:
    """The branches of a model on the Hub, among which are those of its steps. InputError as of find."""
    from huggingface_hub import HfApi

    repository = _named_repository(name)
    with _explained(repository, None):
        return [branch.name for branch in HfApi().list_repo_refs(repository).branches]


def find(path_or_name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: one that exists, or `pythia-70m`, `gpt-neox-20b`, `organization/name`, downloaded.

    revision: of a download, a branch, tag or commit, such as Pythia's step1000; of a folder, a folder inside it. The
    network is not touched where the folder exists. InputError if there is nothing of this name.
    """
    name = str(path_or_name)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _local(folder, revision)
    if name and folder.exists():
        raise InputError(f"{name} is a file: give the folder that holds it and config.json")
    return _download(_named_repository(name), revision)
