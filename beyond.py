"""Beyond the paper, what it names as future work: Textual Inversion and DreamBooth, a flat loop
each.

    python beyond.py inversion --token "<fetal-us>" --spanish FETAL_PLANES_ZENODO --out runs/token
    python beyond.py dreambooth --token sks --prior runs/base/manifest.csv \\
        --spanish FETAL_PLANES_ZENODO --out runs/dreambooth

inversion (Gal et al. 2022, eq. 2) trains the embedding of one new token that all captions name, and
nothing else: embedding.safetensors, for sample.py --embedding. dreambooth (Ruiz et al. 2023, eq. 2)
trains LoRA on captions that name a rare word, held to prior images, which the base model has drawn:
lora.safetensors, for sample.py --rare-token. Both write loss.csv and args.json.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from harness.files import sha256, write_text
from harness.flags import (
    DEVICE,
    OVERWRITE,
    HelpFormatter,
    plain_text,
    require_at_least,
    seed_number,
)
from harness.record import record_run, refuse_to_replace
from harness.script import alone, progress, run
from ldm import CheckpointError
from ldm.cli import DTYPES, add_model_arguments, load_model
from ldm.embedding import add_token, save_embedding, word_embedding
from ldm.text import Contexts
from lora.files import save_lora
from lora.layer import LoRAError
from lora.model import TARGETS, inject, lora_parameters
from lora.training import Draws, make_optimizer
from planes.captions import prior_images, with_token
from planes.datasets import DatasetError
from planes.folders import Captioned
from samplers.schedule import NoiseSchedule
from train_lora import add_data_arguments, keep_prompts, mixed_precision, read_data, read_latents


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.usage = "%(prog)s METHOD [flags] --out OUT"
    parser.add_argument("method", choices=("inversion", "dreambooth"), metavar="METHOD")
    add_model_arguments(parser)
    add = add_data_arguments(parser)
    parser.set_defaults(style_words=False, validation=0, repeats=1, bucket=False)
    add("--token", type=plain_text, required=True, help="the new token, or the rare word")
    add("--init-word", type=plain_text, default="ultrasound", help="where a new token begins")
    add("--prior", type=Path, help="of dreambooth: the manifest.csv of the base model's images")
    add("--prior-weight", type=float, default=1.0, help="of the loss on prior images")
    add = parser.add_argument_group("training").add_argument
    add("--rank", type=int, default=128, help="of dreambooth's LoRA; alpha is the rank")
    add("--layers", default="cross-attention", help=f"of the same: {', '.join(TARGETS)}")
    add("--steps", type=int, default=5000, help="optimizer steps")
    add("--batch-size", type=int, default=2, help="images at once, and as many prior ones")
    add("--lr", type=float, help="learning rate (else: 5e-3 for a token, 1e-4 for LoRA)")
    add("--seed", type=seed_number, default=0, help="of drawn images, A, batches, noise and times")
    add("--device", **DEVICE)
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base and of autocast")
    add("--out", type=Path, required=True, help="a folder")
    add("--overwrite", **OVERWRITE)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = {"inversion": 5e-3, "dreambooth": 1e-4}[args.method]
    require_at_least(parser, args, 1, "per_plane", "rank", "steps", "batch_size", "size")
    require_at_least(parser, args, 0, "prior_weight")
    require_at_least(parser, args, 1e-12, "lr")
    if (args.prior is None) != (args.method == "inversion"):
        parser.error("--prior MANIFEST: dreambooth needs it, and inversion has none")
    return args


class Training:
    """What both loops share: a frozen model, the images as latents, what a step draws, the squared
    error of its prediction."""

    def __init__(self, args, model, images: list[Captioned], seed: int):
        self.unet, self.kind, self.schedule = model.unet, model.prediction_type, NoiseSchedule()
        self.unet.to(args.device, DTYPES[args.dtype])
        latents = read_latents(args, model, images, seed)
        captions, repeats = zip(*((image.caption, image.repeats) for image in images))
        self.draws = Draws(latents, captions, repeats, args.batch_size, 1, seed)
        self.autocast, _ = mixed_precision(args)

    def loss(self, step: int, contexts: Contexts) -> torch.Tensor:
        """E |eps - eps_theta(x_t, t, c)|^2 of a step's batch."""
        (batch,) = self.draws(step)
        x_t = self.schedule.add_noise(batch.latents, batch.noise, batch.t)
        with self.autocast():
            prediction = self.unet(x_t, batch.t, contexts(batch.captions))
        target = self.schedule.target(batch.latents, batch.noise, batch.t, self.kind)
        error = F.mse_loss(prediction.float(), target, reduction="none")
        return error.mean(dim=(1, 2, 3)).mean()


def descend(
    step: int, loss: torch.Tensor, optimizer: torch.optim.Optimizer, clip: float = math.inf
) -> float:
    """One step of the optimizer, on gradients whose norm is cut at `clip`; the loss, LoRAError
    where it is not finite."""
    loss.backward()
    if not loss.isfinite():
        raise LoRAError(f"step {step + 1}: the loss is not finite: try a lower --lr")
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def inversion(args, model, images: list[Captioned]) -> list[float]:
    """Trains v*, the embedding of a new token, and writes it; the loss of each step."""
    vector = word_embedding(model.tokenizer, model.text_encoder, args.init_word)
    vector = add_token(model.tokenizer, model.text_encoder, args.token, vector).vector
    training, dtype = Training(args, model, images, args.seed), DTYPES[args.dtype]
    texts = [*{image.caption for image in images}]
    contexts = Contexts(model.tokenizer, model.text_encoder, texts, 1, dtype, trained=True)
    optimizer = make_optimizer([{"params": [vector], "lr": args.lr}], 0.0, eight_bit=False)
    losses = []
    for step in progress(range(args.steps), desc="token", unit="step"):
        losses.append(descend(step, training.loss(step, contexts), optimizer))
    save_embedding(args.out / "embedding.safetensors", args.token, vector)
    return losses


def dreambooth(args, model, images: list[Captioned]) -> list[float]:
    """Trains LoRA on the images and on the prior ones, and writes it; the loss of each step."""
    prior, dtype = prior_images(args.prior), DTYPES[args.dtype]
    training = Training(args, model, images, args.seed)
    of_prior = Training(args, model, prior, args.seed + 1)
    texts = [*{image.caption for image in (*images, *prior)}]
    contexts = Contexts(model.tokenizer, model.text_encoder, texts, 1, dtype, trained=False)
    inject(model.unet, args.rank, args.rank, args.layers, seed=args.seed)
    group = {"params": lora_parameters(model.unet), "lr": args.lr}
    optimizer = make_optimizer([group], 0.01, eight_bit=False)
    losses = []
    for step in progress(range(args.steps), desc="DreamBooth", unit="step"):
        loss = training.loss(step, contexts) + args.prior_weight * of_prior.loss(step, contexts)
        losses.append(descend(step, loss, optimizer, clip=1.0))
    save_lora(args.out / "lora.safetensors", {"lora_unet": model.unet}, {"ss_seed": args.seed})
    return losses


@alone
def main(args):
    refuse_to_replace(args)
    images, _ = read_data(args)
    images = [replace(image, caption=with_token(image.caption, args.token)) for image in images]
    model = load_model(args, device=args.device)
    losses = {"inversion": inversion, "dreambooth": dreambooth}[args.method](args, model, images)
    rows = [f"{step},{loss:.6f}\n" for step, loss in enumerate(losses, start=1)]
    write_text(args.out / "loss.csv", "step,loss\n" + "".join(rows))
    keep_prompts(args)
    hashes = {str(image.path): sha256(image.path) for image in images}
    record_run(args.out, args, model.sha256() | hashes)


if __name__ == "__main__":
    run(parse_args, main, CheckpointError, DatasetError, LoRAError)
