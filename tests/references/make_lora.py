"""Makes lora/: a tiny Stable Diffusion, LoRA files as other tools write them, and what those tools
compute with them.

    python tests/references/make_lora.py ../shared/reference/lora

- base, inputs: U-Net and text encoder of a few thousand seeded numbers, rounded to float16
- one file for each layout. diffusers 0.42.1 and PEFT 0.21.2 wrote lora_down, lora_AB and
  peft_folder. kohya has the names and header of a file that sd-scripts (48d368fa) wrote, attn_procs
  the names of one by diffusers 0.17.1; their numbers are from here
- outputs: of the networks with each file, computed by PEFT's layers in float32
- train_start, train_end, train: three steps of AdamW through PEFT's layers, as sd-scripts takes
  them: its initialisation, loss, clipping, rates and weight decay
- sd_scripts_*: three layers cut out of files by sd-scripts, and what it merged them to
"""

import copy
import re
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).parent / "lora"
SIZES = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 8}
TEXT = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 12}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CUT = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.1.1.",
    "mid_block.attentions.0.proj_in": "middle_block.1.",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": "output_blocks.11.1.",
}
"""Layer -> the block that it stands in, as CompVis and sd-scripts number them."""


def with_lora(networks, unet: dict, text: dict | None = None, B: float = 0.3):
    """Copies of the networks with PEFT's layers, whose B has that standard deviation; rounded to
    float16."""
    networks = copy.deepcopy(networks)
    for network, settings in zip(networks, (unet, text)):
        if settings:
            inject_adapter_in_model(LoraConfig(**settings), network)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, B)
            parameter.data = parameter.data.half().float()
    return networks


@torch.no_grad()
def outputs(networks, inputs: dict, strength: float) -> list:
    for layer in (layer for network in networks for layer in network.modules()):
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", strength)
    unet, text = networks
    context = text(inputs["ids"]).last_hidden_state
    return [context, unet(inputs["x"], inputs["t"], context.expand(2, -1, -1)).sample]


def kohya(networks) -> dict:
    """The tensors of PEFT's layers by sd-scripts' names, with alpha 2."""
    tensors = {}
    for network, prefix in zip(networks, ("lora_unet_", "lora_te_text_model_")):
        for path, layer in network.named_modules():
            if isinstance(layer, LoraLayer):
                name = prefix + path.removeprefix("text_model.").replace(".", "_")
                tensors[f"{name}.lora_down.weight"] = layer.lora_A["default"].weight
                tensors[f"{name}.lora_up.weight"] = layer.lora_B["default"].weight
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def train(networks, ids) -> dict:
    unet, text = networks
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    trained = [[p for p in network.parameters() if p.requires_grad] for network in networks]
    groups = [{"params": params, "lr": lr} for params, lr in zip(trained, (1e-4, 5e-5))]
    optimizer, found = torch.optim.AdamW(groups, weight_decay=0.01), {}
    for step, t in enumerate((638, 420, 378)):
        x, noise = torch.randn(2, 1, 4, 8, 8)
        x_t = abar[t].sqrt() * x + (1 - abar[t]).sqrt() * noise
        loss = (unet(x_t, t, text(ids).last_hidden_state).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*trained[0], *trained[1]], 0.05)
        optimizer.step()
        found |= {f"x_{step}": x, f"noise_{step}": noise, f"t_{step}": torch.tensor([t])}
        found |= {f"loss_{step}": loss.detach(), f"norm_{step}": norm}
    return found


def main() -> None:
    shared = Path(sys.argv[1])  # the larger set
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SIZES, attention_head_dim=2)
    text = CLIPTextModel(CLIPTextConfig(**TEXT, bos_token_id=48, eos_token_id=49))
    base = with_lora([network.requires_grad_(False).eval() for network in (unet, text)], {})
    named = zip(("unet", "text_encoder.text_model"), base)  # as SD's files name them
    tensors = {f"{n}.{k}": v.half() for n, m in named for k, v in m.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "base.safetensors")
    ids = torch.tensor([[48, 3, 1, 4, 15, 9, *6 * [49]]])
    inputs = {"x": torch.randn(2, 4, 8, 8), "t": torch.tensor([17, 801]), "ids": ids}
    save_file(inputs, HERE / "inputs.safetensors")

    gaussian = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"}
    attention, clip = gaussian | {"target_modules": ATTENTION}, gaussian | {"target_modules": CLIP}
    mixed = attention | {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 6}}
    half = {"lora_alpha": 2}
    every = gaussian | half | {"target_modules": TRANSFORMER}
    made = {
        "kohya": with_lora(base, every, clip | half),
        "lora_down": with_lora(base, attention, clip),
        "lora_AB": with_lora(base, mixed | {"use_rslora": True}, clip | half),
        "peft_folder": with_lora(base, mixed),
        "attn_procs": with_lora(base, attention),
    }
    found = {}
    for name in made:
        for strength in (-0.5, 1.0):
            both = zip(("context", "eps"), outputs(made[name], inputs, strength))
            found |= {f"{name}.{strength}.{what}": output for what, output in both}
    save_file(found, HERE / "outputs.safetensors")

    with safe_open(shared / "kohya_default_r4a2_fp32.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    tensors = {name: tensor.half() for name, tensor in kohya(made["kohya"]).items()}
    assert tensors.keys() == {name for name in names if not re.search(r"_te_.*layers_[23]", name)}
    save_file(tensors, HERE / "kohya.safetensors", metadata)

    states = {name: list(map(get_peft_model_state_dict, made[name])) for name in list(made)[1:3]}
    write = StableDiffusionPipeline.save_lora_weights
    down = map(convert_state_dict_to_diffusers, states["lora_down"])
    write(HERE, *down, weight_name="lora_down.safetensors")
    configs = [network.peft_config["default"].to_dict() for network in made["lora_AB"]]
    said = dict(zip(("unet_lora_adapter_metadata", "text_encoder_lora_adapter_metadata"), configs))
    write(HERE, *states["lora_AB"], weight_name="lora_AB.safetensors", **said)

    unet = made["peft_folder"][0]
    folder = get_peft_model(copy.deepcopy(base[0]), unet.peft_config["default"])
    for parameter, value in zip(folder.parameters(), unet.parameters(), strict=True):
        parameter.data = value
    folder.save_pretrained(HERE / "peft_folder")
    (HERE / "peft_folder" / "README.md").unlink()

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(made["attn_procs"][0]))
    before, after = r"(?:unet\.)?(.*)\.(to_\w+?)(?:\.0)?\.lora\.", r"\1.processor.\2_lora."
    tensors = {re.sub(before, after, name): tensor for name, tensor in state.items()}
    assert tensors.keys() == load_file(shared / "attnprocs17_noprefix_r4.safetensors").keys()
    save_file(tensors, HERE / "attn_procs.safetensors")

    kaiming = {"init_lora_weights": True}
    networks = with_lora(base, every | kaiming, clip | half | kaiming, B=0)
    save_file(kohya(networks), HERE / "train_start.safetensors")
    save_file(train(networks, inputs["ids"]), HERE / "train.safetensors")
    save_file(kohya(networks), HERE / "train_end.safetensors")

    weights, cut = load_file(shared / "base_small.safetensors"), {}
    for name in ("default_r4a2_fp32", "noalpha_r8_fp16", "unetonly_r4a1_bf16"):
        merged = load_file(shared / f"ref_kohya_{name}.safetensors")
        starts = tuple(f"lora_unet_{path.replace('.', '_')}." for path in CUT)
        with safe_open(shared / f"kohya_{name}.safetensors", "pt") as file:
            names = file.keys()
            tensors = {key: file.get_tensor(key) for key in names if key.startswith(starts)}
            save_file(tensors, HERE / f"sd_scripts_{name}.safetensors", file.metadata())
        for path, block in CUT.items():
            key = block + re.sub(r".*attentions\.\d\.", "", path) + ".weight"
            cut[f"base.{path}"] = weights[f"model.diffusion_model.{key}"]
            cut[f"{name}.{path}"] = merged[f"merged/{key}"]
    save_file(cut, HERE / "sd_scripts_merged.safetensors")


if __name__ == "__main__":
    main()
