"""Attentive Normalization (Wang et al., CVPR 2020, section 3), in the paper's order.

A feature map is divided softly into regions, one for each of n learned entities, and every region is normalized by
its own mean and variance: distant pixels of one kind share their statistics, at linear cost.
"""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.ops.attentive_norm import attentive_norm, obstacle
from attnorm.ops.dispatch import IMPLEMENTATIONS, resolve
from attnorm.ops.regional_norm import Moments, Statistics, regional_norm
from attnorm.ops.soft_layout import SelfSampling, draw_positions, soft_layout


class AttentiveNorm2d(nn.Module):
    """AN(X) = rho * regional_norm(v(X), layout(X)) + X (Eq. 6). At the start rho is 0 and the layer is the identity.

    Args:
        num_features: C, channels of the feature map.
        num_entities: n, how many semantic entities compete for each pixel.
        temperature: tau of Eq. 4; multiplies the logits.
        affine: alpha_i and beta_i of Eq. 5, one pair per entity and channel.
        value_projection: Normalize v(X), a 1x1 convolution of X, rather than X itself.
        reduction: k(X) and q(X) have C / reduction channels, at least 1.
        statistics: "weighted" moments of a soft region; "masked": as the text literally reads; "released": as the
            authors' code computes them.
        moments: "instance", or "batch": over all images, with running moments for evaluation (Table 4, "w BN").
        orthogonality: Eq. 1 on rows scaled to length 1 ("cosine"), or on the rows as they are ("raw").
        self_sampling: The regularizing branch of Eq. 2. Without it key, query and t do not exist.
        shared_sampling: Draw one set of positions for the whole batch rather than one per image.
        clamp_t: Clip t to [0, 1].
        eps: Added to the variance (to the standard deviation with "masked" and "released").
        impl: "auto", or one of "reference" (the equations to the letter, with n times the memory of x), "fused" (the
            same as matrix products), "native" (compiled for the CPU) and "triton" (GPU kernels). "auto" takes the last
            two where they can run, and says once why it does not; docs/performance.md compares them.

    In evaluation mode the self-sampling branch is off (t = 0, section 4) and no random number is drawn.
    The choices where the paper is silent are listed in docs/paper.md.
    """

    def __init__(
        self,
        num_features: int,
        num_entities: int = 16,
        *,
        temperature: float = 0.1,
        affine: bool = True,
        value_projection: bool = True,
        reduction: int = 8,
        statistics: Statistics = "weighted",
        moments: Moments = "instance",
        orthogonality: Literal["cosine", "raw"] = "cosine",
        self_sampling: bool = True,
        shared_sampling: bool = False,
        clamp_t: bool = False,
        eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("statistics", statistics, ("weighted", "masked", "released")),
            ("moments", moments, ("instance", "batch")),
            ("orthogonality", orthogonality, ("cosine", "raw")),
            ("impl", impl, ("auto", *IMPLEMENTATIONS)),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        if min(num_features, num_entities, reduction) < 1:
            raise ValueError(
                f"num_features is {num_features}, num_entities {num_entities}, reduction {reduction}; "
                "expected at least 1 each"
            )
        self.num_features, self.num_entities = num_features, num_entities
        self.temperature, self.eps, self.impl = temperature, eps, impl
        self.statistics, self.moments, self.orthogonality = statistics, moments, orthogonality
        self.self_sampling, self.shared_sampling, self.clamp_t = self_sampling, shared_sampling, clamp_t

        # Section 3.1: n entities, the rows of W; never spectrally normalized, whatever the network around it is.
        self.entities = nn.Conv2d(num_features, num_entities, 1, bias=False)
        if self_sampling:
            self.key = nn.Conv2d(num_features, max(num_features // reduction, 1), 1)
            self.query = nn.Conv2d(num_features, max(num_features // reduction, 1), 1)
            self.t = nn.Parameter(torch.full((num_entities,), 0.1))  # Eq. 3
        # Section 3.3: what is normalized, and the regions' affine transformations.
        self.value = nn.Conv2d(num_features, num_features, 1) if value_projection else None
        self.weight = nn.Parameter(torch.ones(num_entities, num_features)) if affine else None  # beta
        self.bias = nn.Parameter(torch.zeros(num_entities, num_features)) if affine else None  # alpha
        self.rho = nn.Parameter(torch.zeros(()))  # Eq. 6
        has_running = moments == "batch"
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.register_buffer("running_mean", torch.zeros(num_entities, num_features) if has_running else None)
        self.register_buffer("running_var", torch.ones(num_entities, num_features) if has_running else None)
        self.reset_entities()

    def reset_entities(self) -> None:
        """W ~ N(0, 1), whatever initializes the rest: much smaller rows would make the layout uniform (row 4)."""
        nn.init.normal_(self.entities.weight)

    def forward(
        self, x: Tensor, *, return_layout: bool = False, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalizes `x`, [N, C, H, W], floating; returns the same shape, dtype and memory format.

        Args:
            return_layout: Return (output, layout) with the layout [N, K, H, W] that was used.
            generator: Where the sampled positions come from in training; None for torch's global one.
        """
        self._check(x)
        impl = resolve("AttentiveNorm2d", self.impl, self._candidates(x))
        if impl in ("native", "triton") and not return_layout:
            return self._in_one(x, impl, generator)  # all that follows, without a tensor of the size of x in between

        layout = self.layout(x, generator=generator)
        v = x if self.value is None else self.value(x)
        with no_autocast(x):
            x_bar = regional_norm(  # Eq. 5
                v,
                layout,
                self.weight,
                self.bias,
                statistics=self.statistics,
                moments=self.moments,
                running_mean=self.running_mean,
                running_var=self.running_var,
                training=self.training,
                eps=self.eps,
                impl=self._plain_impl,
            )
            out = (x + self.rho * x_bar).to(x.dtype)  # Eq. 6; the first term's memory format is the sum's
        return (out, layout) if return_layout else out

    def layout(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The soft semantic layout of `x` (Eq. 2-4), [N, K, H, W], at least float32, summing to 1 over K."""
        self._check(x)
        with no_autocast(x):
            sampling = self._sampling(x, generator) if self.self_sampling and self.training else None
            entities = self.entities.weight.flatten(1)
            return soft_layout(x, entities, sampling, temperature=self.temperature, impl=self._plain_impl)

    @property
    def _plain_impl(self) -> str:
        """How layout and regional normalization are computed where they are wanted one by one."""
        return self.impl if self.impl in ("reference", "fused") else "auto"

    def _in_one(self, x: Tensor, impl: str, generator: torch.Generator | None) -> Tensor:
        assert self.value is not None and self.value.bias is not None
        with no_autocast(x):
            sampling = self._sampling(x, generator) if self.self_sampling and self.training else None
            return attentive_norm(
                x,
                self.entities.weight.flatten(1),
                sampling,
                self.value.weight.flatten(1),
                self.value.bias,
                self.weight,
                self.bias,
                self.rho,
                temperature=self.temperature,
                eps=self.eps,
                impl=impl,
            )

    def _candidates(self, x: Tensor) -> dict[str, str | None]:
        """Every implementation, best first, and why it cannot run on `x`."""
        switch = None
        if self.statistics != "weighted" or self.moments != "instance":
            switch = f"statistics={self.statistics!r} with moments={self.moments!r}"
        elif self.value is None:
            switch = "value_projection=False"
        if switch is not None:
            switch += " is computed by the plain implementations only"
        elif not 0 < x[:1].numel() < 2**31:
            switch = f"an image has {x[:1].numel()} values; expected at least 1 and fewer than 2^31"
        best = {"cuda": "triton", "cpu": "native"}.get(x.device.type)
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        kind = (x.device, x.dtype, self.num_features, self.num_entities, channels_last)
        fast = {name: switch or obstacle(name, *kind) for name in ("native", "triton") if name in (best, self.impl)}
        return fast | {"fused": None, "reference": None}

    def _sampling(self, x: Tensor, generator: torch.Generator | None) -> SelfSampling:
        """Self-sampling regularization: n random points of k(X) as alternatives to the entities."""
        positions = draw_positions(x, self.num_entities, shared=self.shared_sampling, generator=generator)
        t = self.t.clamp(0, 1) if self.clamp_t else self.t
        key, query = self.key, self.query
        assert key.bias is not None and query.bias is not None
        return SelfSampling(key.weight.flatten(1), key.bias, query.weight.flatten(1), query.bias, t, positions)

    def orthogonality_penalty(self) -> Tensor:
        """Eq. 1 without its weight: ||W W^T - I||_F^2, a scalar; rows of length 1 unless orthogonality="raw"."""
        with no_autocast(self.entities.weight):
            rows = self.entities.weight.flatten(1)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            if self.orthogonality == "cosine":
                rows = F.normalize(rows, dim=1)
            identity = torch.eye(self.num_entities, dtype=rows.dtype, device=rows.device)
            return (rows @ rows.T - identity).square().sum()

    def extra_repr(self) -> str:
        text = f"{self.num_features}, num_entities={self.num_entities}, temperature={self.temperature:g}"
        switches = {
            "affine=False": self.weight is None,
            "value_projection=False": self.value is None,
            f"statistics={self.statistics!r}": self.statistics != "weighted",
            f"moments={self.moments!r}": self.moments != "instance",
            f"orthogonality={self.orthogonality!r}": self.orthogonality != "cosine",
            "self_sampling=False": not self.self_sampling,
            "shared_sampling=True": self.shared_sampling,
            "clamp_t=True": self.clamp_t,
            f"impl={self.impl!r}": self.impl != "auto",
        }
        return ", ".join([text, *(switch for switch, is_set in switches.items() if is_set)])

    def _check(self, x: Tensor) -> None:
        expected = f"expected a floating feature map [N, {self.num_features}, H, W]"
        if not isinstance(x, Tensor):
            raise ValueError(f"got {type(x).__name__}; {expected}")
        if x.ndim != 4:
            raise ValueError(f"got {x.ndim} dimensions, {tuple(x.shape)}; {expected}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"got {x.shape[1]} channels, {tuple(x.shape)}; {expected}")
        if not x.is_floating_point():
            raise ValueError(f"got a tensor of {x.dtype}; {expected}")


class Observation(NamedTuple):
    """What one AttentiveNorm2d saw in one forward pass."""

    features: Tensor  # its input, [N, C, H, W]
    layout: Tensor  # [N, K, H, W]


@contextlib.contextmanager
def observe_layouts(model: nn.Module) -> Iterator[dict[str, Observation]]:
    """Collects what every AttentiveNorm2d inside `model` sees in the forward passes made in the block, by module name.

    A later pass replaces an earlier one. Use it in evaluation mode: in training mode the layout is drawn anew.

        with observe_layouts(generator.eval()) as seen:
            generator(z, labels)
        seen["blocks.2.an"].layout
    """
    seen: dict[str, Observation] = {}

    def hook(name: str, layer: AttentiveNorm2d, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            seen[name] = Observation(inputs[0].detach(), layer.layout(inputs[0]))

    handles = [
        layer.register_forward_hook(lambda layer, inputs, _, name=name: hook(name, layer, inputs))
        for name, layer in model.named_modules()
        if isinstance(layer, AttentiveNorm2d)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Logits and statistics keep their precision under autocast, which would round them to 8 bits (row 11)."""
    if x.device.type == "meta":  # where autocast does not exist
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
