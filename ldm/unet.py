"""The denoising U-Net of Stable Diffusion (Rombach et al. 2022): eps(x_t, t, context)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.layers import (
    Downsample,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are SD 1.5's (859,520,964 parameters)."""

    in_channels: int = 4
    out_channels: int = 4
    # one level each, from the finest to the coarsest
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # does the level attend to the text?
    layers_per_block: int = 2
    # per level; diffusers' json calls it attention_head_dim
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    # SD 2: linear layers for the 1x1 convolutions around a transformer
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    @property
    def multiple(self) -> int:
        """The latents' height and width must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


class UNetBlock(nn.Module):
    """One level of the U-Net: residual blocks, a transformer behind each where the level attends, a
    resampler.

    transformers: how many there are, if not one behind each: the middle has but one

    It holds modules under the names of the checkpoints; UNet.forward runs them, since skips cross
    levels.
    """

    def __init__(
        self,
        channels: list[tuple[int, int]],
        config: UNetConfig,
        heads: int | None,
        downsample: bool = False,
        upsample: bool = False,
        transformers: int | None = None,
    ):
        super().__init__()
        temb_dim, out = 4 * config.block_out_channels[0], channels[-1][1]
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(i, o, temb_dim, groups, config.norm_eps) for i, o in channels
        )
        if heads is not None:
            self.attentions = nn.ModuleList(
                SpatialTransformer(
                    o, config.cross_attention_dim, heads, groups, config.use_linear_projection
                )
                for _, o in channels[:transformers]
            )
        else:
            self.attentions = [None] * len(channels)
        self.downsamplers = nn.ModuleList([Downsample(out, symmetric=True)]) if downsample else ()
        self.upsamplers = nn.ModuleList([Upsample(out)]) if upsample else ()


class UNet(nn.Module):
    """Predicts the noise (or v) in noisy latents, given the time and the text.

    latents: (B, 4, H, W) x_t of the forward process, H and W multiples of config.multiple
    t: (B,) or a scalar, times in [0, 999], fractions allowed
    context: (B, S, D) text embeddings, D = config.cross_attention_dim; any S
    Returns (B, 4, H, W) in the weights' dtype.

    Set `gradient_checkpointing` to recompute each block in the backward pass: slower, far less
    memory.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths, layers = config.block_out_channels, config.layers_per_block
        # None where a level does not attend
        heads = [n if attends else None for n, attends in zip(config.num_heads, config.attention)]
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList(
            UNetBlock(
                [(i, o)] + [(o, o)] * (layers - 1),
                config,
                heads[n],
                downsample=n < last,
            )
            for n, (i, o) in enumerate(pairwise((widths[0], *widths)))
        )
        middle = [(widths[-1], widths[-1])] * 2
        self.mid_block = UNetBlock(middle, config, config.num_heads[-1], transformers=1)

        # the way up meets, in reverse, every feature map that the way down left behind
        skips = [widths[0]] + [o for n, o in enumerate(widths) for _ in range(layers + (n < last))]
        self.up_blocks = nn.ModuleList()
        width = widths[-1]
        for n in reversed(range(len(widths))):
            channels = []
            for _ in range(layers + 1):
                channels.append((width + skips.pop(), widths[n]))
                width = widths[n]
            self.up_blocks.append(UNetBlock(channels, config, heads[n], upsample=n > 0))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        t = torch.as_tensor(t, device=latents.device).expand(len(latents))
        # a norm's, since a LoRA may be around any convolution
        dtype = self.conv_norm_out.weight.dtype
        temb = self.time_embedding(
            timestep_embedding(t, self.config.block_out_channels[0]).to(dtype)
        )

        # down: every output is kept for the way up
        h = self.conv_in(latents)
        skips = [h]
        for block in self.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions):
                h = self._run(resnet, h, temb)
                if attention is not None:
                    h = self._run(attention, h, context)
                skips.append(h)
            for downsampler in block.downsamplers:
                h = downsampler(h)
                skips.append(h)

        # middle
        h = self._run(self.mid_block.resnets[0], h, temb)
        h = self._run(self.mid_block.attentions[0], h, context)
        h = self._run(self.mid_block.resnets[1], h, temb)

        # up
        for block in self.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions):
                h = self._run(resnet, torch.cat([h, skips.pop()], dim=1), temb)
                if attention is not None:
                    h = self._run(attention, h, context)
            for upsampler in block.upsamplers:
                h = upsampler(h)

        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _run(self, module: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)
