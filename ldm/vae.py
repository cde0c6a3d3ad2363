"""The autoencoder of Stable Diffusion: images to latents an eighth of their size, and back (Rombach
et al. 2022)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.layers import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # every group norm of the VAE


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; the defaults are SD 1.5's (83,653,863 parameters)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    # from the finest level to the coarsest
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    # brings latents to about unit variance, which the noise schedule expects
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class Posterior:
    """The encoder's Gaussian q(z | image) over unscaled latents (Kingma & Welling 2014).

    mean, logvar: (B, 4, H, W), logvar clamped to [-30, 20]
    """

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """The reparameterisation z = mean + std * noise; noise: (B, 4, H, W), unit normal."""
        return self.mean + self.std * noise


class VAEAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, with its group norm and
    residual.

    The four matrices lie directly in it, as in the checkpoints.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class VAEBlock(nn.Module):
    """One level of the encoder or decoder: residual blocks, then a resampler."""

    def __init__(
        self, widths: list[int], groups: int, downsample: bool = False, upsample: bool = False
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(i, o, None, groups, EPS) for i, o in pairwise(widths)
        )
        self.downsamplers = (
            nn.ModuleList([Downsample(widths[-1], symmetric=False)]) if downsample else ()
        )
        self.upsamplers = nn.ModuleList([Upsample(widths[-1])]) if upsample else ()

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class VAEMidBlock(nn.Module):
    """The coarsest level: residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Images (B, 3, 8H, 8W) -> moments (B, 8, H, W), the means and the log variances of
    `Posterior`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAEBlock([i] + [o] * config.layers_per_block, groups, downsample=n < len(widths) - 1)
            for n, (i, o) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = VAEMidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """Unscaled latents (B, 4, H, W) -> images (B, 3, 8H, 8W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = VAEMidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            VAEBlock(
                [i] + [o] * (config.layers_per_block + 1), groups, upsample=n < len(widths) - 1
            )
            for n, (i, o) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class AutoencoderKL(nn.Module):
    """A variational autoencoder whose latents the diffusion model lives in."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments = 2 * config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """The Gaussian over UNSCALED latents; images: (B, 3, 8H, 8W) in [-1, 1].

        Raises ValueError where a side is no multiple of config.downsampling.
        """
        height, width, factor = *images.shape[-2:], self.config.downsampling
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height}x{width}: both sides must be multiples of {factor}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def to_latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, 4, H, W), sampled with `noise` of that shape, or the mean where it is
        None."""
        posterior = self.encode(images)
        z = posterior.mean if noise is None else posterior.sample(noise)
        return z * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8H, 8W), about [-1, 1] and not clamped; latents: (B, 4, H, W), scaled."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
