"""Hub ids in place of paths: a server on this machine that speaks the hub's protocol, and a cache
without one."""

import json
import shutil
from argparse import ArgumentTypeError, Namespace
from hashlib import sha1
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from shorthand import Answers, refused, served

from ldm import MINI, CheckpointError
from ldm.checkpoints import load
from ldm.checkpoints.folder import network_files
from ldm.checkpoints.hub import find_model, resolve_model
from ldm.cli import lora_path, model_flags

READ = [  # of a diffusers folder
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
BESIDE = [  # what published repositories hold besides
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "v1-5-pruned.safetensors",
]


def commit(branch: str) -> str:
    return sha1(branch.encode()).hexdigest()


class Hub:
    """Repositories: "owner/name" -> {branch: {file: bytes}}, or the error code of one that is
    closed."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]] | str] = {}
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository, verb, revision = "/".join(parts[:2]), *(parts[2:4] or ("revision", "main"))
        held = self.repositories.get(repository, "RepoNotFound")
        # the listing of a gated one is public
        if isinstance(held, str) and not (api and held == "GatedRepo"):
            return {"RepoNotFound": 401}.get(held, 403), {"X-Error-Code": held}, b""
        held = {"main": {name: b"" for name in READ}} if isinstance(held, str) else held
        revision = next((branch for branch in held if commit(branch) == revision), revision)
        files = held.get(revision)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api and verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            found = {"id": repository, "sha": commit(revision), "siblings": siblings}
            return 200, {}, json.dumps(found).encode()
        if api:
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        content = files["/".join(parts[4:])]
        etag = f'"{sha1(content).hexdigest()}"'
        return 200, {"X-Repo-Commit": commit(revision), "ETag": etag}, content


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in this process, and an empty cache."""
    hub = Hub()

    class Handler(Answers):
        def do_GET(self):
            hub.requests.append(self.path)
            self.answer(*hub.answer(self.path))

        do_HEAD = do_GET

    with served(Handler) as endpoint:
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield hub


def published() -> dict[str, bytes]:
    """A repository's files by name, of nearly no size."""
    return {name: b"{}" for name in (*READ, *BESIDE)}


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


# --- downloads


def test_a_path_that_exists_is_itself_even_where_it_could_be_an_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(MINI) == MINI
    assert hub.requests == []


@pytest.mark.slow
def test_of_a_repository_only_what_the_loader_reads_is_downloaded_and_once(hub):
    files = published() | {name: (MINI / name).read_bytes() for name in READ}
    hub.repositories["owner/name"] = {"main": files}
    assert find_model("owner/name") is None
    folder = resolve_model("owner/name")
    assert names(folder) == READ
    assert load(folder).sha256() == load(MINI).sha256()
    hub.requests.clear()
    assert resolve_model("owner/name") == folder == find_model("owner/name")
    assert hub.requests == []
    for lost in ("vae/config.json", "unet/diffusion_pytorch_model.safetensors"):
        (folder / lost).unlink()  # of a download that was cut off
        assert find_model("owner/name") is None
        assert names(resolve_model("owner/name")) == READ


def test_a_revision_is_another_model(hub):
    half = {name: b"half" for name in published()}
    hub.repositories["owner/name"] = {"main": published(), "refs/pr/1": half}
    resolve_model("owner/name")
    assert find_model("owner/name@refs/pr/1") is None
    folder = resolve_model("owner/name@refs/pr/1")
    assert {path.read_bytes() for path in folder.rglob("*.safetensors")} == {b"half"}
    fails("owner/name@2", "owner/name has no branch, tag or commit 2; see http")


STEM = "unet/diffusion_pytorch_model"


def shards(variant):
    return [f"{STEM}{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.mark.parametrize(
    "there, taken",
    [
        (["{}.safetensors", "{}.bf16.safetensors"], ["{}.safetensors"]),
        (["{}.bf16.safetensors", "{}.fp16.safetensors"], ["{}.fp16.safetensors"]),
        (["{}.bf16.safetensors"], ["{}.bf16.safetensors"]),
        (["{}.safetensors.index.json", *shards("")], shards("")),
        (["{}.safetensors.index.fp16.json", *shards(".fp16")], shards(".fp16")),
    ],
)
def test_the_weights_that_are_downloaded_are_those_that_the_loader_prefers(hub, there, taken):
    files = {name: b for name, b in published().items() if not name.startswith(STEM)}
    for name in (name.format(STEM) for name in there):
        parts = {str(n): Path(part).name for n, part in enumerate(taken)}
        files[name] = json.dumps({"weight_map": parts}).encode() if "index" in name else b""
    hub.repositories["owner/name"] = {"main": files | {f"{STEM}.non_ema.safetensors": b""}}
    folder = resolve_model("owner/name")
    taken = [name.format(STEM) for name in taken]
    assert [n for n in names(folder) if n.startswith(STEM) and "index" not in n] == taken
    read = network_files(folder / "unet", "diffusion_pytorch_model")
    assert [file.relative_to(folder).as_posix() for file in read] == taken
    (folder / taken[0]).unlink()
    assert find_model("owner/name") is None


def test_a_single_file_of_a_repository_has_its_name_behind_it(hub):
    hub.repositories["owner/name"] = {"main": published() | {"webui/v1-5.ckpt": b"weights"}}
    for source in ("owner/name/webui/v1-5.ckpt", "owner/name/webui/v1-5.ckpt@main"):
        path = resolve_model(source)
        assert path.name == "v1-5.ckpt" and path.read_bytes() == b"weights"
        assert find_model(source) == path
    assert sum("/resolve/" in request for request in hub.requests) == 2  # HEAD and GET
    fails("owner/name/b.safetensors", r"the repository has no b\.safetensors")


@pytest.mark.slow
def test_a_vae_or_a_tokenizer_is_found_at_the_top_or_in_its_subfolder(hub):
    files = published() | {name: (MINI / name).read_bytes() for name in READ}
    alone = {name.removeprefix("vae/"): b for name, b in files.items() if name.startswith("vae/")}
    hub.repositories |= {"owner/name": {"main": files}, "owner/vae": {"main": alone}}
    for source, vae in (("owner/vae", ""), ("owner/name", "vae/")):
        folder = resolve_model(source, "vae")
        assert names(folder) == [f"{vae}config.json", f"{vae}diffusion_pytorch_model.safetensors"]
        weight = load(MINI, vae=folder).vae.quant_conv.weight
        assert torch.equal(weight, load(MINI).vae.quant_conv.weight)
    folder = resolve_model("owner/name", "tokenizer")
    assert load(MINI, tokenizer=folder).tokenizer.vocab_size == load(MINI).tokenizer.vocab_size


def test_a_cache_without_a_hub_is_enough_and_an_incomplete_one_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit("main"))
    folder = Path(shutil.copytree(MINI, repository / "snapshots" / commit("main")))
    assert resolve_model("owner/name") == folder == resolve_model(f"owner/name@{commit('main')}")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    fails("owner/name", "not whole in the hub cache, and fetching it fails")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert resolve_model("owner/name") == folder
    assert hub.requests == []


# --- errors


def fails(source, message):
    with refused(CheckpointError, message, f"{source}: "):
        resolve_model(source)


NO_PATH = "no such file or folder, and not a hub id like owner/name$"
LICENCE = "closed to you; accept its licence on https://huggingface.co/owner/name and log in"
UNWHOLE = {name: b for name, b in published().items() if not name.startswith(("unet/", "tok"))}
OLD, NEW = (f"{owner}/stable-diffusion-v1-5" for owner in ("runwayml", "stable-diffusion-v1-5"))


@pytest.mark.parametrize(
    "source, held, message",
    [
        *((source, None, NO_PATH) for source in ("sd15", "./owner/name", "/owner/name", "a/b/c")),
        *((source, None, NO_PATH) for source in ("models/v1-5.safetensors", "a/b.ckpt")),
        ("owner/name", None, "and no such repository on the hub; a private one needs `hf auth"),
        (OLD, None, f"withdrawn .* its copy is {NEW}$"),
        ("owner/name", "GatedRepo", LICENCE),
        ("owner/name", "Forbidden", LICENCE),
        ("owner/name", UNWHOLE, r"no tokenizer/merges\.txt.* no unet/config\.json.*FILE\.safet"),
        ("owner/name", {"text_encoder_2/config.json": b""} | published(), "an SDXL model; give"),
    ],
)
def test_what_the_hub_does_not_give_is_told_before_any_download(hub, source, held, message):
    if held is not None:
        hub.repositories[source] = {"main": held} if isinstance(held, dict) else held
    fails(source, message)
    # the listing of a gated one is public
    assert held == "GatedRepo" or not any("/resolve/" in request for request in hub.requests)
    assert message != NO_PATH or not hub.requests


def test_without_a_hub_what_to_do_is_told(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("owner/name@v2", "HF_HUB_OFFLINE.*; run this once where there is a connection")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    fails("a/b/c.safetensors", r"fetching it fails \(.*; run this once where there is a conn")


# --- LoRAs


def test_a_lora_is_named_by_an_id_with_its_file_and_fetched_once(hub, tmp_path):
    hub.repositories["a/b"] = {"main": {"v1.safetensors": b"weights", "v2.safetensors": b"others"}}
    path = lora_path("a/b/v1.safetensors")
    assert path.read_bytes() == b"weights" and not (path.parent / "v2.safetensors").exists()
    asked = len(hub.requests)
    assert lora_path("a/b/v1.safetensors") == path
    assert lora_path(str(tmp_path)) == tmp_path
    for name in (str(tmp_path / "none.safetensors"), "none.safetensors"):
        with refused(ArgumentTypeError, NO_PATH, name):
            lora_path(name)
    assert len(hub.requests) == asked
    with refused(ArgumentTypeError, "has no v3"):
        lora_path("a/b/v3.safetensors")
    with refused(ArgumentTypeError, "^runs/l/x.safetensors: no such file or folder, and no such"):
        lora_path("runs/l/x.safetensors")
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"peft"}
    hub.repositories["a/peft"] = {"main": adapter | {"README.md": b"no"}}
    hub.repositories["a/deep"] = {"main": {f"x/{name}": b for name, b in adapter.items()}}
    assert names(lora_path("a/peft")) == [*adapter]
    file = lora_path("a/deep/x/adapter_model.safetensors")
    assert file.read_bytes() == b"peft" and names(file.parent) == [*adapter]


def test_another_script_is_given_the_same_model_by_its_flags():
    given = {"model": "a", "tokenizer": "b", "vae": None, "prediction_type": None}
    flags = ["--model", "a", "--tokenizer", "b"]
    assert model_flags(Namespace(**given, ema=True)) == [*flags, "--ema"]
    assert model_flags(Namespace(**given, ema=False)) == flags
