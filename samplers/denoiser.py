"""A network's prediction of noise or velocity as a denoiser D(x; sigma) of the samplers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from samplers.schedule import Nodes, SamplerError


class Denoiser:
    """denoise(x, sigma) -> x0, with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598,
    eq. 6).

    model: model(x_vp, t, context) -> (B, C, H, W) eps or v, where x_vp = x / sqrt(1 + sigma^2) has
        unit variance and context's dtype, and t (B,) is floating-point and may be fractional
    nodes: says which t belongs to which sigma
    context: (B, S, D) the condition; negative_context: (B, S', D) what guidance leads away from
    guidance_scale: 1 is the condition alone; otherwise both go through the model, as one batch of
        2B where S' = S and in two calls of B where it is not (as webui does; padding the shorter
        one would change the image)
    prediction_type: what the model predicts, "epsilon" or "v_prediction" (Salimans & Ho 2022, arXiv
        2202.00512)

    Raises SamplerError for an unknown prediction_type, a guidance_scale that is not finite, or
    guidance without a negative_context of context's B and D.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        nodes: Nodes,
        context: Tensor,
        negative_context: Tensor | None = None,
        guidance_scale: float = 1.0,
        prediction_type: str = "epsilon",
    ):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise SamplerError(
                f"unknown prediction type {prediction_type!r}: choose epsilon or v_prediction"
            )
        if not math.isfinite(guidance_scale):
            raise SamplerError(f"guidance scale {guidance_scale}: must be a finite number")
        self.guided = guidance_scale != 1
        if self.guided and negative_context is None:
            raise SamplerError(
                f"guidance scale {guidance_scale:g} needs a negative context; without one use 1"
            )
        if self.guided and negative_context.shape[::2] != context.shape[::2]:
            shapes = f"{tuple(negative_context.shape)} and {tuple(context.shape)}"
            raise SamplerError(
                f"negative context and context are {shapes}: only their number of tokens may differ"
            )
        self.model = model
        self.nodes = nodes
        self.contexts = [negative_context, context] if self.guided else [context]  # one call each
        self.joint = self.guided and negative_context.shape == context.shape
        if self.joint:
            self.contexts = [torch.cat(self.contexts)]
        self.guidance_scale = guidance_scale
        self.prediction_type = prediction_type
        # (t, was all finite that was returned there?) of each call
        self.finite: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x0 (B, C, H, W), in x's dtype, of noisy latents x = x0 + sigma * eps of the same
        shape."""
        scale = math.hypot(1, sigma)
        x_vp = (x / scale).to(self.contexts[0].dtype)
        if self.joint:
            x_vp = torch.cat([x_vp, x_vp])
        t_dtype = torch.promote_types(x.dtype, torch.float32)  # half precision has no t = 946.42
        time = self.nodes.t(sigma)
        t = torch.full((len(x_vp),), time, dtype=t_dtype, device=x.device)

        predictions = [self.model(x_vp, t, context) for context in self.contexts]
        prediction = torch.cat(predictions).to(x.dtype)
        if self.guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (positive - negative)
        if self.prediction_type == "epsilon":
            x0 = x - sigma * prediction
        else:
            x0 = x / scale**2 - sigma / scale * prediction
        self.finite.append((time, x0.isfinite().all()))
        return x0

    def require_finite(self) -> None:
        """Raises SamplerError with the first t at which what was returned is not finite: no later
        step mends that, and a decoder makes a picture even of it. To be asked behind the last step:
        at each it would wait for the GPU."""
        for t, finite in self.finite:
            if not finite:
                kind = str(self.contexts[0].dtype).removeprefix("torch.")
                raise SamplerError(
                    f"what the model predicts at t = {t:g} is not finite in {kind}: take a wider"
                    " --dtype where this is a half, another model, LoRA or embedding, or a lower"
                    " guidance scale"
                )
