"""What makes the networks faster and changes no more than last bits: memory layout, compilation,
batches to decode.

Without `--compile` on a CPU nothing here does anything, and images are those of the plain code to
the bit.
"""

import torch
from torch import nn

from ldm import CheckpointError
from ldm.layers import ResnetBlock, SpatialTransformer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

ENOUGH = 256  # images or steps that pay for the minute or so which compiling for a GPU takes
FORMS = 256
"""Compiled forms of one piece of code that torch is to keep, one for each shape that it meets: the
residual blocks of SD 1.5 meet 14, and beyond its own limit of 8 torch would give up on all of
them."""


def wants_compiling(asked: bool | None, device: str, work: int) -> bool:
    """--compile as it was asked for; where it was not, on a GPU that has `work` enough for it and
    can compile."""
    if asked is None:
        return device.startswith("cuda") and work >= ENOUGH and cannot_compile(device) is None
    if asked and (reason := cannot_compile(device)):
        raise CheckpointError(f"--compile: {reason}; leave it out, or say --no-compile")
    return asked


def cannot_compile(device: str) -> str | None:
    """Why torch.compile cannot work for this device on this machine, or None; found out on a sum,
    in seconds."""
    try:
        torch.compile(lambda x: (x + 1).square().sum(), fullgraph=True)(
            torch.ones(64, device=device)
        )
    # whatever it lacks: triton, a C++ compiler, Python's headers, a newer GPU
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return (lines or [type(error).__name__])[0][:200]
    return None


def arrange(unet: UNet, vae: AutoencoderKL) -> None:
    """For a GPU: channels last, as its convolutions want them, and a decoder in float16 where the
    U-Net is in half precision; elsewhere a float32 decoder. In place."""
    on_gpu, half = (
        unet.conv_norm_out.weight.is_cuda,
        unet.conv_norm_out.weight.dtype != torch.float32,
    )
    vae.to(torch.float16 if on_gpu and half else torch.float32)
    if on_gpu:
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)


def compile_whole(*networks: nn.Module) -> None:
    """Compile each network as one graph, in place, which its first call at each shape does.

    A part that cannot be in the graph is an error, and never run uncompiled in silence. On a GPU
    the whole becomes a CUDA graph, a single launch; the next call overwrites what the last one
    returned.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    for network in networks:
        on_gpu = next(network.parameters()).is_cuda
        network.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else None)


def compile_blocks(unet: UNet) -> None:
    """Compile each residual block and each transformer by itself, in place, for training: what is
    recomputed by gradient checkpointing is then a compiled block, and blocks of the same shapes
    share a graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    for block in unet.modules():
        if isinstance(block, ResnetBlock | SpatialTransformer):
            block.compile(fullgraph=True, dynamic=False)


def decoded_at_once(vae: AutoencoderKL, width: int, height: int, batch_size: int) -> int:
    """How many images of width x height px the decoder is given at once: on a GPU as many as a
    quarter of its memory holds, a divisor of batch_size, since each other number would be compiled
    anew; elsewhere one.

    The most memory is taken at the finest level, where about four maps of the second width are
    alive at once.
    """
    weight = vae.post_quant_conv.weight
    if not weight.is_cuda:
        return 1
    each = 4 * max(vae.config.block_out_channels[:2]) * width * height * weight.itemsize
    fit = torch.cuda.get_device_properties(weight.device).total_memory // 4 // each
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= max(fit, 1))
