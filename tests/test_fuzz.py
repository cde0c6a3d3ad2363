"""Damaged inputs, 300 of each kind: one line that says so, or what the bytes that are left say;
nothing in between."""

import csv
import io
import json
import shutil
import zlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoint import CONFIG, UNTOLD, random_model, save_single_file

from classify import ClassifyError
from classify.models import read_weights
from ldm import MINI, CheckpointError, webui
from ldm.checkpoints import NETWORKS, load, save_folder
from ldm.checkpoints.tokenizer import load_tokenizer
from ldm.cli import load_model
from ldm.embedding import load_embedding, save_embedding
from ldm.text import TextConfig
from lora import LoRAError, inject, save_lora
from lora.files.formats import read
from lora.training import load_checkpoint, make_optimizer, save_checkpoint
from planes import PLANES
from planes.captions import read_prompts
from planes.datasets import DatasetError, read_african, read_spanish, read_synthetic
from planes.folders import read_captioned_folder
from planes.phantoms.phantom import write_african_layout, write_spanish_layout
from planes.pictures import open_image
from samplers import SamplerError

pytestmark = pytest.mark.slow
COUNT = 300
# which the scripts catch
MISTAKES = (CheckpointError, ClassifyError, DatasetError, LoRAError, OSError, SamplerError)


def mutations(data, seed=0, count=COUNT):
    """`count` damaged copies of some bytes, a third each: cut short, single bytes changed, two
    stretches swapped."""
    rng = np.random.default_rng(seed)
    header = min(len(data), 600)
    for n in range(count):
        damaged = bytearray(data)
        if n % 3 == 0:
            damaged = damaged[: rng.integers(len(data))]
        elif n % 3 == 1:
            end = header if n % 2 else len(data)  # every second time in the header
            for place in rng.integers(end, size=rng.integers(1, 6)):
                damaged[place] = rng.integers(256)
        else:
            size = int(rng.integers(1, max(2, min(64, len(data) // 4))))
            a, b = sorted(rng.integers(len(data) - size, size=2).tolist())
            damaged[a : a + size], damaged[b : b + size] = data[b : b + size], data[a : a + size]
        if bytes(damaged) != data:
            yield bytes(damaged)


def survey(path, reader, says, count=COUNT):
    """Every damaged copy of a file is read: refused in one line, or read to what `says` of its
    bytes.

    says(damaged, result): does the content bear the result out, which may be another than the whole
    file's? Returns how many were refused.
    """
    whole, refused = path.read_bytes(), 0
    for damaged in mutations(whole, count=count):
        path.write_bytes(damaged)
        try:
            result = reader()
        except MISTAKES as error:
            assert "\n" not in str(error) and str(error).strip(), error
            refused += 1
        else:
            assert says(damaged, result), (path.name, damaged[:200])
    path.write_bytes(whole)
    return refused


def tensors_of(data):
    """A safetensors file's tensors as bytes, by name, read without the library."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}


def bytes_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def vocabulary(merges=()):
    letters = [f"{chr(c)}{end}" for c in range(33, 127) for end in ("", "</w>")]
    return [
        *letters,
        *(pair.replace(" ", "") for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """CLIP's format with letters for tokens."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.json").write_text(
        json.dumps({token: n for n, token in enumerate(vocabulary())})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def model(words):
    return random_model(CONFIG, words)


def holds(model, tensors):
    """Is every parameter of the model one of the file's tensors, in its bytes?"""
    stored = {content for _, _, content in tensors.values()}
    return all(
        bytes_of(v) in stored for n in NETWORKS for v in getattr(model, n).state_dict().values()
    )


def test_a_single_file(model, words, tmp_path):
    path = tmp_path / "a.safetensors"
    save_single_file(model, path)

    def says(damaged, result):
        return holds(result, tensors_of(damaged))

    assert survey(path, lambda: load(path, config=UNTOLD, tokenizer=words), says) > COUNT // 3


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_folders_json(model, tmp_path, name):
    save_folder(model, tmp_path / "a")

    def says(damaged, result):
        values, config = json.loads(damaged), result.unet.config
        if name.startswith("unet"):
            return list(config.block_out_channels) == values.get(
                "block_out_channels", [320, 640, 1280, 1280]
            )
        return result.prediction_type == values.get("prediction_type", "epsilon")

    assert survey(tmp_path / "a" / name, lambda: load(tmp_path / "a"), says) > COUNT // 4


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_tokenizer(words, tmp_path, name):
    folder, size = shutil.copytree(words, tmp_path / "words"), TextConfig()
    if name == "merges.txt":
        pairs = [f"{a} {b}</w>" for a, b in zip("abcdefgh", "ijklmnop")]
        (folder / "vocab.json").write_text(
            json.dumps({t: n for n, t in enumerate(vocabulary(pairs))})
        )
        (folder / name).write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    if name == "tokenizer.json":
        load_tokenizer(folder, size).save_pretrained(folder)
        (folder / "merges.txt").unlink()

    def says(damaged, result):
        if name == "merges.txt":  # a pair is one of the file's lines
            merges = json.loads(result.backend_tokenizer.to_str())["model"]["merges"]
            return {" ".join(pair) for pair in merges} <= {*damaged.decode().split("\n")}
        values = json.loads(damaged)
        values = values if name == "vocab.json" else values["model"]["vocab"]
        return values.items() <= result.get_vocab().items()

    assert survey(folder / name, lambda: load_tokenizer(folder, size), says) > COUNT // 4


def test_a_pickle(model, words, tmp_path):
    save_single_file(model, tmp_path / "a.safetensors")
    state, path = load_file(tmp_path / "a.safetensors"), tmp_path / "a.ckpt"
    torch.save({k: state[k] for k in sorted(state)[:40]}, path)
    whole = {bytes_of(value) for value in state.values()}

    def says(damaged, result):  # a zip's sums tell every change
        return all(bytes_of(value) in whole for value in result[0].values())

    assert survey(path, lambda: read_weights("resnet18", path), says) > COUNT // 3


def test_a_lora(tmp_path):
    network, path = (
        torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)),
        tmp_path / "a.safetensors",
    )
    inject(network, 4, 4.0, ".*", "gaussian", torch.Generator().manual_seed(0))
    save_lora(path, {"lora_unet": network}, {"ss_seed": 0})

    def says(damaged, result):
        stored = tensors_of(damaged)
        pairs = result.pairs.items()
        return all(
            bytes_of(getattr(pair, part)) == stored[f"{name}.lora_{part}.weight"][2]
            for name, pair in pairs
            for part in ("down", "up")
        )

    assert survey(path, lambda: read(path), says) > COUNT // 3


def test_an_embedding(tmp_path):
    path, base = tmp_path / "a.safetensors", load(MINI)
    save_embedding(
        path, "<us>", torch.arange(base.text_encoder.config.hidden_size, dtype=torch.float32)
    )
    table = base.text_encoder.text_model.embeddings.token_embedding
    length, marks = len(base.tokenizer), 0

    def reader():
        nonlocal marks
        base.text_encoder.text_model.embeddings.token_embedding, marks = table, marks + 1
        return load_embedding(path, base.tokenizer, base.text_encoder, f"<mark{marks}>")

    def says(damaged, result):
        ((_, _, content),) = tensors_of(damaged).values()
        return result[1].vector.detach().numpy().tobytes() == content

    assert survey(path, reader, says) > COUNT // 3 and len(base.tokenizer) > length


def chunks(png):
    """(type, content) of the chunks of a PNG; None for one whose sum is wrong."""
    found, place = [], 8
    while place + 8 <= len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        total = png[place + 8 + size : place + 12 + size]
        found.append(
            (kind, content) if zlib.crc32(kind + content).to_bytes(4, "big") == total else None
        )
        place += 12 + size
    return found


def test_a_png_and_the_settings_in_it(tmp_path):
    path, rng = tmp_path / "brain" / "euler_1.png", np.random.default_rng(0)
    numbers = {"steps": 4, "guidance": 1.5, "seed": 1, "width": 32, "height": 24, "clip_skip": 1}
    texts = dict.fromkeys(
        ("loras", "lora_hashes", "init_image", "model", "model_hash", "negative_prompt"), ""
    )
    shot = webui.Shot(
        image="brain/euler_1.png", plane="brain", prompt="a photo of fetal brain", sampler="euler", spacing=None,
        order=None, strength=None, **numbers, **texts,
    )  # fmt: skip
    pixels = rng.integers(256, size=(24, 32, 3), dtype=np.uint8)
    webui.save_shot(path, pixels, shot)

    def has_settings(damaged, result):
        return result[0] == shot and None not in chunks(damaged)

    def has_pixels(damaged, result):
        return np.array_equal(np.asarray(result), pixels) and None not in chunks(damaged)

    assert survey(path, lambda: webui.read_shot(path), has_settings) > COUNT // 2
    assert survey(path, lambda: open_image(path), has_pixels) > COUNT // 2


def rows_of(damaged):
    """The lines of a table that have cells enough to be a row."""
    first, *lines = damaged.decode("utf-8-sig").replace("\r", "\n").split("\n")
    cells = max(",;", key=first.count)
    full = [line for line in lines if line.count(cells) >= first.count(cells)]
    return [first, *(line for line in full if line.strip(" ;,\t\x0b\x0c"))]


def tells_every_row(damaged, result):
    lines, names = rows_of(damaged), [record.path.name for record in result]
    return len(result) == len(lines) - 1 and all(
        name.rpartition(".")[0].split(".png")[0] in line for name, line in zip(names, lines[1:])
    )


def test_a_manifest(tmp_path):
    table, path = io.StringIO(), tmp_path / "manifest.csv"
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "plane", "prompt", "sampler"])
    writer.writerows(
        [f"{p}/{n}.png", p, f"a photo, of {p}", "euler"] for p in PLANES for n in range(9)
    )
    path.write_text(table.getvalue())
    assert survey(path, lambda: read_synthetic(path), tells_every_row) > COUNT // 3


@pytest.mark.parametrize("site", ["spanish", "african"])
def test_a_dataset_table(tmp_path, site):
    if site == "spanish":
        write_spanish_layout(tmp_path, 2, test=1, seed=0)
        reader, path = read_spanish, tmp_path / "FETAL_PLANES_DB_data.csv"
    else:
        write_african_layout(tmp_path, patients=2, seed=0)
        reader, path = read_african, tmp_path / "African_planes_database.csv"
    assert survey(path, lambda: reader(tmp_path), tells_every_row) > COUNT // 3


def test_a_caption(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(
        "a photo of fetal brain, é, dark, flat\nand more\n", encoding="utf-8"
    )

    def says(damaged, result):
        return [image.caption for image in result] == [
            damaged.decode("utf-8-sig").splitlines(False)[0].strip()
        ] or (damaged.decode("utf-8-sig").partition("\n")[0].strip() == result[0].caption)

    assert survey(tmp_path / "a.txt", lambda: read_captioned_folder(tmp_path), says) > COUNT // 12


def test_a_list_of_captions(tmp_path):
    for name in "abc":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    lines = [
        json.dumps({"file_name": f"{name}.png", "text": f"a photo of {name}"}) for name in "abc"
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    def says(damaged, result):
        rows = [json.loads(line) for line in damaged.decode().split("\n") if line.strip()]
        return [image.caption for image in result] == [row["text"].strip() for row in rows]

    assert (
        survey(tmp_path / "metadata.jsonl", lambda: read_captioned_folder(tmp_path), says)
        > COUNT // 2
    )


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(
        json.dumps({plane: [f"a photo of fetal {plane}", f"a scan, {plane}"] for plane in PLANES})
    )

    def says(damaged, result):
        return {str(plane): list(texts) for plane, texts in result.items()} == json.loads(damaged)

    assert survey(path, lambda: read_prompts(str(path)), says) > COUNT // 2


def test_a_training_state(tmp_path):
    path, identity = tmp_path / "checkpoint.pt", {"rank": "4", "lr": "0.001"}
    lora = [torch.nn.Parameter(torch.randn(4, 24)) for _ in range(4)]
    optimizer, _ = make_optimizer([{"params": lora, "lr": 1e-3}], 0.01, False)
    sum(tensor.square().sum() for tensor in lora).backward()
    optimizer.step()
    scaler, rows = torch.amp.GradScaler(enabled=False), [(1, 4, "0.5", "0.1", 1e-3)]
    save_checkpoint(path, identity, 1, rows, lora=lora, optimizer=optimizer, scaler=scaler)
    before = [tensor.detach().clone() for tensor in lora]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]

    def says(damaged, result):  # a zip's sums tell every change
        now = [state["exp_avg"] for state in optimizer.state.values()]
        return result == (1, rows) and all(map(torch.equal, (*lora, *now), (*before, *moments)))

    kept = {"lora": lora, "optimizer": optimizer, "scaler": scaler}
    assert survey(path, lambda: load_checkpoint(path, identity, **kept), says) > COUNT // 3


def test_weights_that_are_not_finite_are_named_wherever_the_damage_put_them(model, tmp_path):
    save_folder(model, tmp_path / "a")
    path = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    flags = dict.fromkeys(("tokenizer", "vae", "prediction_type")) | {
        "model": str(tmp_path / "a"),
        "ema": False,
    }

    def says(damaged, result):
        return holds(result, tensors_of(damaged) | others) and all(
            v.isfinite().all() for v in result.unet.parameters()
        )

    others = {
        n: (None, None, bytes_of(v))
        for n, v in enumerate((*model.vae.parameters(), *model.text_encoder.parameters()))
    }
    assert survey(path, lambda: load_model(Namespace(**flags)), says, count=60) > 20
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"unet\.conv_out\.bias is not finite"):
        load_model(Namespace(**flags))
