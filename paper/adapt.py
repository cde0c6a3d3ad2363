"""What is trained in a frozen Stable Diffusion, and which words its training images get.

| | trained | captions |
|---|---|---|
| the paper | LoRA on the U-Net | one prompt per plane |
| kohya's script as the authors ran it | LoRA on the text encoder too | those of the folder |
| Textual Inversion (Gal et al. 2022) | the embedding of a new token, with LoRA or alone | name the token |
| DreamBooth (Ruiz et al. 2023) | LoRA, held to images of the base model | name a rare word |
"""

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from harness.files import sha256, write_text
from harness.record import record_run
from ldm.checkpoints import Model
from ldm.checkpoints.tokenizer import tokenizer_hash
from ldm.embedding import add_token, word_embedding
from ldm.generate import generate
from ldm.images import decode_images
from ldm.text import encode_prompts
from lora.model import inject, lora_parameters
from planes.captions import PROMPTS_FILE, say_style, training_images, with_token
from planes.folders import REPEATS, Captioned
from planes.sites import classes_of, prompts_of, read_site


@dataclass
class Trained:
    """What an optimizer gets of a model, and what is written when it is done."""

    # with LoRA, by the prefix of their keys in its file
    networks: dict[str, nn.Module] = field(default_factory=dict)
    groups: list[dict] = field(default_factory=list)  # of {"params", "lr"}
    token: nn.Parameter | None = None  # (D,), the embedding of a new token

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]


def default_repeats(images: Path | None) -> int:
    """Image passes per epoch where --repeats does not say: 1 if kohya's N_name folders do, 100 as
    in the paper."""
    return (
        1 if images and any(REPEATS.fullmatch(folder.name) for folder in images.glob("*/")) else 100
    )


def captioned_images(args: Namespace) -> tuple[list[Captioned], list[tuple[Path, str]]]:
    """The images that the flags of train_lora.py choose, with the captions and repeats that they
    ask for; and those that are held out from training, as (file, caption).

    Raises DatasetError.
    """
    token = args.learn_token or args.rare_token
    images, unseen = training_images(
        args.spanish,
        args.images,
        args.manifest,
        args.per_plane,
        args.seed,
        args.validation,
        args.source,
        args.prompt_template,
    )
    images, unseen = (
        [
            replace(i, caption=with_token(i.caption, token), repeats=i.repeats * args.repeats)
            for i in group
        ]
        for group in (images, unseen)
    )
    if args.style_words:
        images, unseen = map(say_style, images), map(say_style, unseen)
    return [*images], [(image.path, image.caption) for image in unseen]


def material(
    paths: Sequence[Path],
    captions: Sequence[str],
    repeats: Sequence[int],
    model: Model,
    args: Namespace,
) -> dict[str, str]:
    """What a run was made of besides its settings and weights, which it must have again when it
    goes on.

    paths, captions: of the images and, behind them, of the base model's own; repeats: of the former
    """
    files, words = "".join(map(sha256, paths)), json.dumps([[*captions], [*repeats]])
    return {
        "images and captions": hashlib.sha256((files + words).encode()).hexdigest()[:10],
        "tokenizer": tokenizer_hash(model.tokenizer)[:10],
        "prediction_type": model.prediction_type,
        "dtype": args.dtype,
        "ema": str(args.ema),
    }


def adapt(
    model: Model, args: Namespace, dtype: torch.dtype, say: Callable[[str], object]
) -> Trained:
    """Freeze the model and put into it what the flags of train_lora.py train: float32, whatever the
    base's `dtype`.

    say: is told what gets how many parameters

    Raises LoRAError, CheckpointError.
    """
    trained, targets = Trained(), {}
    if args.rank:
        targets["lora_unet"] = model.unet, args.target, args.lr
    if args.train_text_encoder:
        targets["lora_te"] = (
            model.text_encoder.to(args.device, dtype),
            "text-encoder",
            args.text_encoder_lr,
        )
    generator = torch.Generator().manual_seed(args.seed)
    for prefix, (network, target, lr) in targets.items():
        layers = inject(network, args.rank, args.alpha, target, args.init, generator)
        trained.networks[prefix] = network
        trained.groups.append({"params": lora_parameters(network), "lr": lr})
        count = sum(parameter.numel() for parameter in trained.groups[-1]["params"])
        say(
            f"{len(layers)} layers of {type(network).__name__} get LoRA of rank {args.rank}:"
            f" {count:,} parameters"
        )
    if args.learn_token:
        vector = word_embedding(model.tokenizer, model.text_encoder, args.init_word)
        trained.token = add_token(
            model.tokenizer, model.text_encoder, args.learn_token, vector
        ).vector
        trained.groups.append({"params": [trained.token], "lr": args.token_lr})
        say(
            f"the token {args.learn_token} begins at {args.init_word}: {trained.token.numel()}"
            " parameters"
        )
    return trained


class Contexts:
    """Text embeddings (B, S, D) of captions: computed once, after which the text encoder is let go;
    or, where it or one of its tokens is trained, anew each time, so that gradients reach it.

    captions: all that will be asked for
    autocast: a context of mixed precision, entered where the text encoder is trained
    say: is told how many captions are longer than what the text encoder reads

    Raises CheckpointError where the text encoder is not as deep as args.clip_skip asks.
    """

    def __init__(
        self,
        model: Model,
        captions: Sequence[str],
        args: Namespace,
        dtype: torch.dtype,
        autocast,
        say,
    ):
        self.model, self.clip_skip, self.dtype = model, args.clip_skip, dtype
        self.autocast = autocast if args.train_text_encoder else nullcontext
        self.stored: dict[str, Tensor] = {}
        captions = list(dict.fromkeys(captions))
        read = model.text_encoder.config.max_position_embeddings
        if cut := [
            text for text in captions if len(model.tokenizer(text, verbose=False).input_ids) > read
        ]:
            say(
                f"{len(cut)} captions are cut behind {read - 2} tokens, such as the one that begins"
                f" {cut[0][:40]!r}"
            )
        # now, even if not for good: a clip skip too deep is found before hours of work
        with torch.no_grad():
            stored = self(captions)
        if not args.train_text_encoder and not args.learn_token:
            self.stored, model.text_encoder = dict(zip(captions, stored)), None

    def __call__(self, captions: Sequence[str]) -> Tensor:
        if self.stored:
            return torch.stack([self.stored[caption] for caption in captions])
        with self.autocast():
            encoded = encode_prompts(
                self.model.tokenizer, self.model.text_encoder, captions, self.clip_skip
            )
        return encoded.to(self.dtype)


def record(
    args: Namespace, hashes: Mapping[str, str], paths: Sequence[Path], say: Callable[[str], object]
) -> None:
    """What a run of train_lora.py leaves besides weights: args.json, and the prompts of a site's
    classes.

    hashes: of the model; paths: of the images
    """
    if args.source:
        classes = classes_of(read_site(args.source, "source", train=True))
        prompts = {
            name: [prompt] for name, prompt in prompts_of(classes, args.prompt_template).items()
        }
        text = json.dumps(prompts, indent=2, ensure_ascii=False)
        write_text(args.out / PROMPTS_FILE, text + "\n")
    record_run(
        args.out,
        args,
        {**hashes} | {f"{path.parent.name}/{path.name}": sha256(path) for path in paths},
    )
    if args.device.startswith("cuda"):
        say(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


@torch.no_grad()
def sample_sheet(
    args, model, context_of, autocast, side: int, step: int, captions: list[str]
) -> None:
    """Four samples of each caption as they are now, by Euler, into samples/ of --out; of many
    captions, eight at most, from A to Z."""
    (path := args.out / "samples" / f"step{step:06}.png").parent.mkdir(parents=True, exist_ok=True)
    seeds, rows = [args.seed + n for n in range(4)], []
    settings = {"guidance_scale": args.guidance_scale, "prediction_type": model.prediction_type}
    model.vae.to(args.device)
    for caption in captions[:: math.ceil(len(captions) / 8)]:
        context = context_of([caption]).expand(len(seeds), -1, -1)
        with autocast():
            x0 = generate(model.unet, context, context_of([""]), seeds, [side] * 2, **settings)
        try:
            images = decode_images(model.vae, x0)
        except torch.OutOfMemoryError:  # beside a training that fills the card
            images = decode_images(model.vae.to("cpu"), x0)
        rows.append(torch.cat(list(images), dim=1))
    model.vae.to("cpu")
    Image.fromarray(torch.cat(rows).numpy()).save(path)
