"""The layers that the U-Net and the VAE are made of, under diffusers' attribute names.

Sources: Rombach et al. 2022 (latent diffusion), Vaswani et al. 2017 (attention), Shazeer 2020
(GEGLU), Ho et al. 2020 (residual block, timestep embedding).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [cos(t w), sin(t w)], w_k = 10000^(-k / (dim/2)) (Ho et al. 2020,
    appendix B).

    t: (B,) times in [0, 999]; fractions are kept: Euler's nodes fall between the training times

    Returns (B, dim), always float32: in half precision t * w would be wrong in the first digits.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers from the sinusoidal embedding to temb, which every residual block reads."""

    def __init__(self, dim: int, temb_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, temb_dim)
        self.linear_2 = nn.Linear(temb_dim, temb_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResnetBlock(nn.Module):
    """Residual block: norm, SiLU, conv, twice; temb is added between the two (Ho et al. 2020,
    appendix B).

    x: (B, in_channels, H, W) -> (B, out_channels, H, W)
    temb: (B, temb_dim), or None in the VAE, which knows no time
    """

    def __init__(
        self, in_channels: int, out_channels: int, temb_dim: int | None, groups: int, eps: float
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_dim is not None:
            self.time_emb_proj = nn.Linear(temb_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, eq. 1).

    x: (B, T, C) gives the queries; context: (B, S, D) the keys and values, x itself where it is
        None
    """

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = map(self._split, (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(-2))

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, C / heads)


class GEGLU(nn.Module):
    """(x V) * GELU(x W), with the exact GELU (Shazeer 2020, arXiv 2002.05202, eq. 5); proj holds V,
    then W."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU four times as wide, then back; net.1 is the dropout of the original, which SD trains
    and runs at 0."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention (attn1), cross-attention to the text (attn2), feed-forward; each with its norm
    and residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map (Rombach et al. 2022, appendix E.2.1).

    x: (B, C, H, W); context: (B, S, D)
    The projections are 1x1 convolutions in SD 1 and linear layers in SD 2: the same map, other
    weight shapes.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int, linear: bool):
        super().__init__()
        # 1e-6 here, 1e-5 in the U-Net's other group norms
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.linear = linear
        projection = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[-2]
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.linear else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = _to_map(self.proj_out(h), height) if self.linear else self.proj_out(_to_map(h, height))
        return h + x


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)


def _to_map(x: Tensor, height: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (height, -1))  # (B, HW, C) -> (B, C, H, W)


class Downsample(nn.Module):
    """Halve H and W by a strided convolution; the VAE pads only right and below, the U-Net all
    round."""

    def __init__(self, channels: int, symmetric: bool):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by repeating pixels, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
