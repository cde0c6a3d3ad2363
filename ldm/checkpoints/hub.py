"""Models on the Hugging Face hub: an id in place of a path, taken from the local cache or
downloaded into it.

    owner/name                       a repository that is a diffusers folder
    owner/name@fp16                  one of its branches, tags or commits
    owner/name/file.safetensors      a single file in a repository, of a model or a LoRA

What is cached whole costs no request, so a branch stays as it was when it was first fetched. Of a
folder only what `ldm.checkpoints.load` reads is downloaded: the configs, the tokenizer, and each
network's weights in one precision.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ldm import CheckpointError
from ldm.checkpoints.folder import WEIGHTS, weight_names

# what is taken of a repository -> files; weights may as well be in half precision or in shards
_READS = {
    "model": (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        *(f"{network}/config.json" for network in WEIGHTS),
        *(f"{network}/{stem}.safetensors" for network, stem in WEIGHTS.items()),
    ),
    "vae": ("config.json", f"{WEIGHTS['vae']}.safetensors"),
    "tokenizer": ("merges.txt", "vocab.json"),
    # PEFT's; else a file is to be named
    "lora": ("adapter_config.json", "adapter_model.safetensors"),
}
# withdrawn -> its copy
_SUCCESSORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([^@]+\.(?:safetensors|ckpt)))?(?:@(.+))?")
_FILE = re.compile(r"\.(safetensors|ckpt|pth?|bin)$")


class _Id(NamedTuple):
    repository: str
    file: str | None
    revision: str | None


def resolve_model(source: str | Path, part: str = "model") -> Path:
    """The file or folder that a path or a hub id names, downloaded where it is not here yet.

    part: what is wanted, "model", or a "vae", "tokenizer" or "lora" alone, at the top of the
        repository or in its subfolder

    Raises CheckpointError where there is no such thing, where it is closed to this user, or where
    the hub is out of reach; a complete cached copy is taken without asking the hub.
    """
    if here := find_model(source, part):
        return here
    name = _parse(source)
    try:
        listed = HfApi().model_info(name.repository, revision=name.revision).siblings or ()
        names = [file.rfilename for file in listed]
        chosen, missing = _choose(part, names, name.file)
        if missing:
            raise CheckpointError(
                f"{source}: the repository has no {', no '.join(missing)}; if it has a single file,"
                f" give it as {name.repository}/FILE.safetensors"
            )
        if "text_encoder_2/config.json" in names and part == "model":
            raise CheckpointError(f"{source}: an SDXL model; give one of SD 1 or SD 2")
        folder = snapshot_download(name.repository, revision=name.revision, allow_patterns=chosen)
        return Path(folder, name.file or "")
    except (HTTPError, OSError) as error:
        reason = f"no such file or folder, {_reason(error, name)}"
        raise CheckpointError(f"{source}: {reason}") from None


def find_model(source: str | Path, part: str = "model") -> Path | None:
    """Where a path or a hub id is on this machine; None for a hub id that would have to be
    downloaded.

    Raises CheckpointError where it is neither.
    """
    if Path(source).exists():
        return Path(source)
    name = _parse(source)
    folder, names = _cached(name)
    return None if _choose(part, names, name.file)[1] else folder / (name.file or "")


def _parse(source: str | Path) -> _Id:
    if not (found := _ID.fullmatch(str(source))) or _FILE.search(found[1]):
        raise CheckpointError(f"{source}: no such file or folder, and not a hub id like owner/name")
    return _Id(*found.groups())


def _cached(name: _Id) -> tuple[Path, set[str]]:
    """The cached folder of a repository, complete or not, and the names of its files; none where
    it is not there."""
    options = {"local_files_only": True, "allow_patterns": []}  # no file, so that none is missing
    try:
        root = Path(snapshot_download(name.repository, revision=name.revision, **options))
    except LocalEntryNotFoundError:
        return Path(), set()
    return root, {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}


def _choose(
    part: str, names: Collection[str], file: str | None = None
) -> tuple[list[str], list[str]]:
    """Of a repository's files those that the loader reads, and what it would miss; `file`: that one
    is wanted, and what belongs to it."""
    if file:
        config = file.replace("adapter_model.safetensors", "adapter_config.json")  # PEFT's
        wanted = [*dict.fromkeys((file, config))]
        return wanted, [name for name in wanted if name not in names]
    prefix = f"{part}/" if any(name.startswith(f"{part}/") for name in names) else ""
    chosen, missing = [], []
    for name in (prefix + name for name in _READS[part]):
        stem, weights, _ = name.partition(".safetensors")
        found = weight_names(stem, names) if weights else [name] * (name in names)
        chosen += found
        missing += [] if found else [name]
    return chosen, missing


def _reason(error: Exception, name: _Id) -> str:
    """Why nothing came from the hub, and what to do."""
    page = f"https://huggingface.co/{name.repository}"
    if isinstance(error, RevisionNotFoundError):
        return f"and {name.repository} has no branch, tag or commit {name.revision}; see {page}"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        if successor := _SUCCESSORS.get(name.repository):
            return f"and withdrawn from the hub; its copy is {successor}"
        return "and no such repository on the hub; a private one needs `hf auth login`"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        advice = f"accept its licence on {page} and log in with `hf auth login`"
        return f"and on the hub closed to you; {advice}"
    why = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"not whole in the hub cache, and fetching it fails ({why}); run this once where there is a"
        " connection, and with the same cache"
    )
