"""Attentive Normalization (Wang et al., CVPR 2020, section 3), in the paper's order.

A feature map is divided softly into regions, one for each of n learned entities, and every region is normalized by
its own mean and variance: distant pixels of one kind share their statistics, at linear cost.
"""

# N batch, C channels, K entities (the paper's n), D channels of key and query.

from __future__ import annotations

import logging
import math
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.gate import new_gate, read_gate
from attnorm.ops.attentive_norm import attentive_norm
from attnorm.ops.dispatch import IMPLEMENTATIONS, at_least_float32, is_transformed, say_once
from attnorm.ops.regional_norm import Moments, Statistics
from attnorm.ops.soft_layout import draw_positions, layout_logits, sample, soft_layout
from attnorm.system.devices import no_autocast

log = logging.getLogger("attnorm")

# The standard deviation over the entities of the logits that the paper's tau of 0.1 gives features of unit variance in
# its 256 channels; how much of the features' running moments a batch replaces; and the least variance of a channel
# beside the median (row 7).
SPREAD = 1.6
MOMENTUM = 0.1
LEAST_VAR = 0.01


class AttentiveNorm2d(nn.Module):
    """AN(X) = rho * regional_norm(v(X), layout(X)) + X (Eq. 6). At the start rho is 0 and the layer is the identity.

    Args:
        num_features: C, channels of the feature map.
        num_entities: n, how many semantic entities compete for each pixel.
        temperature: tau of Eq. 4, which multiplies the logits: a number, or "auto". By itself the layer keeps the
            spread of the logits that the paper has, whatever the scale, offset and number of the features: entities,
            keys and queries meet (X - mean) / deviation, and tau is 1.6 / sqrt(C). Mean and deviation of each channel
            are running moments of the training batches (over all processes, where there are several: all have to come
            here), from the first batch on. They are saved with the weights and fixed in evaluation, and inside
            torch.func's transformations; no gradient goes through them.
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
        impl: "auto", or one of "reference" (Eq. 5 to the letter, with n times the memory of x), "fused" (the same as
            matrix products), "native" (compiled for the CPU) and "triton" (GPU kernels). "auto" takes the last two
            where they can run, and says once why it does not; docs/performance.md compares them.

    Raises:
        ValueError: a choice or a number that there is not, by its name.

    In evaluation mode the self-sampling branch is off (t = 0, section 4) and no random number is drawn.
    The choices where the paper is silent are listed in docs/paper.md.
    """

    place = ""  # in a network, where `attnorm.replace` or `insert_after` put the layer: what errors begin with

    def __init__(
        self,
        num_features: int,
        num_entities: int = 16,
        *,
        temperature: float | Literal["auto"] = "auto",
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
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if temperature != "auto" and not (is_number and 0 < temperature < math.inf):
            raise ValueError(f"temperature is {temperature!r}; expected a positive number or 'auto'")
        if min(num_features, num_entities, reduction) < 1:
            raise ValueError(
                f"num_features is {num_features}, num_entities {num_entities}, reduction {reduction}; "
                "expected at least 1 each"
            )
        self.num_features, self.num_entities = num_features, num_entities
        self.eps, self.impl = eps, impl
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
        self.rho = new_gate()  # Eq. 6
        self.feature_mean: Tensor | None
        self.feature_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        self._asks_for_auto = temperature == "auto"  # weights may know better: `_load_from_state_dict`
        self._set_temperature(temperature)
        has_running = moments == "batch"
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.register_buffer("running_mean", torch.zeros(num_entities, num_features) if has_running else None)
        self.register_buffer("running_var", torch.ones(num_entities, num_features) if has_running else None)
        self.reset_entities()

    def reset_entities(self) -> None:
        """W ~ N(0, 1), whatever initializes the rest: much smaller rows would make the layout uniform (row 4).

        To be called after an initialization that goes over all convolutions of a network, W among them.
        """
        nn.init.normal_(self.entities.weight)

    def forward(
        self, x: Tensor, *, return_layout: bool = False, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalizes `x`, [N, C, H, W], floating; returns the same shape, dtype and memory format.

        Args:
            return_layout: Return (output, layout) with the layout [N, K, H, W] that was used.
            generator: Where the sampled positions come from in training; None for torch's global one.

        Raises:
            ValueError: `x` is of another shape or dtype, or without a pixel; or a convolution of the layer has been
                given a forward or hooks of its own, which it would not see.
        """
        self._check(x)
        with no_autocast(x):
            if self.temperature == "auto" and self.training:
                self._track(x)
            x, filters, offset = self._logits(x, generator)  # Eq. 2 and 3
            value, value_bias = (None, None) if self.value is None else self._weights("value", x)
            return attentive_norm(
                x,
                # Eq. 4: S = softmax(filters X + offset)
                filters,
                offset,
                # Eq. 5: X_bar = sum_i ((v(X) - mu_i) / sigma_i * beta_i + alpha_i) * S_i, where mu_i and sigma_i are
                # the mean and standard deviation of v(X) over the soft region S_i
                value,
                value_bias,
                self.weight,
                self.bias,
                # Eq. 6: rho * X_bar + X
                self.rho.squeeze(0),
                statistics=self.statistics,
                moments=self.moments,
                running_mean=self.running_mean,
                running_var=self.running_var,
                training=self.training,
                eps=self.eps,
                impl=self.impl,
                return_layout=return_layout,
            )

    def layout(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The soft semantic layout of `x` (Eq. 2-4), [N, K, H, W], at least float32, summing to 1 over K."""
        self._check(x)
        with no_autocast(x):
            return soft_layout(*self._logits(x, generator))

    def logits(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What Eq. 4 takes the softmax over entities of, tau and all: [N, K, H, W], at least float32."""
        self._check(x)
        with no_autocast(x):
            return layout_logits(*self._logits(x, generator))

    def _logits(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 2 and 3: filters [M, K, C] and offset [M, K] of tau (t F + f(X)) = filters X + offset.

        Both F and f are linear in X, beyond the sampled k(X)_i. M is N, or 1 where the batch shares its filters. First
        comes x itself, which is the one to go on with: see `sample`.
        """
        dtype = at_least_float32(x, self.rho)
        moments = self._feature_moments(dtype)
        entities, offset = self._meeting_features("entities", x, dtype, moments)
        filters, offset = entities[None], offset[None]  # f(X) = W X, section 3.1
        if self.self_sampling and self.training:
            # Section 3.2: n random points of k(X), max-pooled 2x2, are alternatives to the entities.
            positions = draw_positions(x, self.num_entities, shared=self.shared_sampling, generator=generator)
            x, at_pixels = sample(x, positions)  # [N, C, K, 4]
            key, key_bias = self._meeting_features("key", x, dtype, moments)
            query, query_bias = self._meeting_features("query", x, dtype, moments)
            corners = (key @ at_pixels.to(dtype).flatten(2) + key_bias[:, None]).unflatten(2, (-1, 4))
            keys = corners.amax(3).transpose(1, 2)  # k(X)_i, [N, K, D]
            # Eq. 2: F_ij = k(X)_i . q(X)_j with q(X) = Q X + b, which is (Q^T k_i) . X_j + k_i . b.
            # Eq. 3: t F + f(X).
            t = self.t.clamp(0, 1) if self.clamp_t else self.t
            filters = t[:, None] * (keys @ query) + filters
            offset = t * (keys @ query_bias) + offset
        tau = SPREAD / math.sqrt(self.num_features) if self.temperature == "auto" else self.temperature
        return x, tau * filters, tau * offset  # Eq. 4's tau

    def _meeting_features(
        self, name: str, x: Tensor, dtype: torch.dtype, moments: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of a 1x1 convolution of the features: with temperature="auto", of (X - mean) / deviation."""
        weight, bias = (part.to(dtype) for part in self._weights(name, x))
        if moments is not None:
            mean, rstd = moments
            weight = weight * rstd
            bias = bias - weight @ mean
        return weight, bias

    def _feature_moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The features' running mean and 1 / deviation, [C] each, with temperature="auto"."""
        if self.temperature != "auto":
            return None
        assert self.feature_mean is not None and self.feature_var is not None
        # Copies: the next batch changes the moments, perhaps before the gradients of this one are computed.
        mean, var = self.feature_mean.to(dtype, copy=True), self.feature_var.to(dtype, copy=True)
        # A channel that hardly varies counts as one of a tenth of the others' deviation; and a deviation below the
        # rounding of its mean is none.
        var = var.clamp_min(LEAST_VAR * var.sort().values[len(var) // 2])
        return mean, (var + 1e-10 * mean.square() + 1e-30).rsqrt()

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        """Takes a training batch into the features' running moments; the first one makes them."""
        mean, var, batches = self.feature_mean, self.feature_var, self.num_batches_tracked
        assert mean is not None and var is not None and batches is not None
        if is_transformed():  # where no buffer can change
            say_once("AttentiveNorm2d: inside torch.func transformations the features' moments stay as they are")
            return
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing computes again, within a backward pass, what these moments made
        are_shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (x.numel() or are_shared):
            return
        batch_mean, batch_var = _moments(x)
        if are_shared:
            # In float64, where a variance survives beside the square of a mean; a process without images adds nothing.
            count = x.numel() / self.num_features
            squares = batch_var.double() + batch_mean.double().square()
            sums = torch.cat([batch_mean.double(), squares, squares.new_ones(1)])
            sums = sums * count if count else torch.zeros_like(sums)
            dist.all_reduce(sums)
            batch_mean, squares = (sums[:-1] / sums[-1]).chunk(2)
            batch_var = (squares - batch_mean.square()).clamp_min(0)
        # A batch that is not finite is left out: the moments would never be finite again.
        is_finite = batch_mean.isfinite().all() & batch_var.isfinite().all()
        batches += is_finite
        share = batches.clamp_min(1).reciprocal().clamp_min(MOMENTUM)
        for moment, new in ((mean, batch_mean), (var, batch_var.clamp_max(torch.finfo(var.dtype).max))):
            old = moment.to(new.dtype)
            moment.copy_(torch.where(is_finite, old.lerp(new, share.to(new.dtype)), old))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Weights without moments of the features are of a layer with tau = 0.1, once the default: they keep it."""
        has_moments = f"{prefix}feature_mean" in state_dict
        if self._asks_for_auto and any(name.startswith(f"{prefix}entities.") for name in state_dict):
            if has_moments and self.temperature != "auto":
                self._set_temperature("auto")
            elif not has_moments and self.temperature == "auto":
                log.warning("the weights have no %sfeature_mean: temperature becomes 0.1, as they were trained", prefix)
                self._set_temperature(0.1)
        var = state_dict.get(f"{prefix}feature_var")
        if var is not None and var.ndim == 0:  # once one number for all channels: the same layouts
            state_dict[f"{prefix}feature_var"] = var.repeat(self.num_features)
        read_gate(state_dict, f"{prefix}rho")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _set_temperature(self, temperature: float | Literal["auto"]) -> None:
        self.temperature = temperature
        is_auto, like = temperature == "auto", self.rho.detach()
        self.register_buffer("feature_mean", like.new_zeros(self.num_features) if is_auto else None)
        self.register_buffer("feature_var", like.new_ones(self.num_features) if is_auto else None)
        self.register_buffer("num_batches_tracked", like.new_zeros((), dtype=torch.int64) if is_auto else None)

    def _weights(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out] of a 1x1 convolution of the layer, as a call of it on `x` would have them.

        The spectral_norm, weight_norm and pruning of torch.nn.utils renew the weight by a hook before each call, so
        such hooks run here. What would change or see what the convolution returns is an error: it is never called.
        """
        convolution: nn.Conv2d = getattr(self, name)
        is_changed = type(convolution).forward is not nn.Conv2d.forward or "forward" in vars(convolution)
        for key, hook in convolution._forward_pre_hooks.items():
            takes_keywords = key in convolution._forward_pre_hooks_with_kwargs
            is_changed |= (hook(convolution, (x,), {}) if takes_keywords else hook(convolution, (x,))) is not None
        hooks = (convolution._forward_hooks, convolution._backward_hooks, convolution._backward_pre_hooks)
        if is_changed or any(hooks):
            raise ValueError(
                f"{name} is {type(convolution).__name__} with a forward of its own, or a hook on what goes in or comes "
                "out; expected a plain nn.Conv2d: AN uses its weight and bias and never calls it. Change the weight "
                "instead (torch.nn.utils.parametrize), or put the hook on the AttentiveNorm2d"
            )
        weight, bias = convolution.weight.flatten(1), convolution.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

    def orthogonality_penalty(self) -> Tensor:
        """Eq. 1 without its weight: ||W W^T - I||_F^2, a scalar; rows of length 1 unless orthogonality="raw"."""
        with no_autocast(self.rho):
            rows, _ = self._weights("entities", self.rho.new_empty(0, self.num_features, 1, 1))
            if hasattr(rows, "full_tensor"):  # of torch's fully_shard, outside the block's forward
                rows = rows.full_tensor()
            rows = rows if rows.dtype == torch.float64 else rows.float()
            if self.orthogonality == "cosine":
                rows = F.normalize(rows, dim=1)
            identity = torch.eye(self.num_entities, dtype=rows.dtype, device=rows.device)
            return (rows @ rows.T - identity).square().sum()

    def extra_repr(self) -> str:
        tau = self.temperature if self.temperature == "auto" else f"{self.temperature:g}"
        text = f"{self.num_features}, num_entities={self.num_entities}, temperature={tau}"
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
        if not isinstance(x, Tensor):
            self._refuse(type(x).__name__)
        if x.ndim != 4:
            self._refuse(f"{x.ndim} dimensions, {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            self._refuse(f"{x.shape[1]} channels, {tuple(x.shape)}")
        if not x.is_floating_point():
            self._refuse(f"a tensor of {x.dtype}")
        if x.shape[2] * x.shape[3] == 0:
            self._refuse(f"a map without a pixel, {tuple(x.shape)}", " with H and W at least 1")

    def _refuse(self, got: str, which: str = "") -> NoReturn:
        # Here alone `place` is read: torch.compile compiles anew for every value that it meets.
        where = f"{self.place}: " if self.place else ""
        raise ValueError(f"{where}got {got}; expected a floating feature map [N, {self.num_features}, H, W]{which}")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel over all images, [C] each."""
    dtype = at_least_float32(x)
    if torch.compiler.is_compiling():
        var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
        return mean, var
    # On a CPU that takes several times as long as the layer's own forward, and elsewhere a copy of 16-bit features.
    # Parts need neither: on a CPU they stay in the cache.
    length = 2**17 if x.device.type == "cpu" else 2**22
    mean = x.mean((0, 2, 3), dtype=dtype)
    squares = torch.zeros_like(mean)
    for part in x.split(max(length * x.shape[2] // max(x.numel(), 1), 1), dim=2):
        squares += (part - mean[:, None, None]).square_().sum((0, 2, 3))
    return mean, squares / max(x.numel() // x.shape[1], 1)
