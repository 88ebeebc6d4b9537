"""Everything that training changes, and nothing else: it goes into a checkpoint and comes back bit for bit.

Random numbers are not part of it: every step draws from a generator seeded with (seed, images seen).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from attnorm.layers.batch_norm import BatchNorm2d


class ExponentialAverage:
    """An average of a network's weights over training, reached gradually: decay_n = min(decay, n / (n + 9))."""

    def __init__(self, network: nn.Module, decay: float, *, foreach: bool = True) -> None:
        self.source = network
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.foreach = decay, foreach

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, counted from 1.

        Running moments are averaged like the weights that they belong to; the singular vectors of spectral norm are
        copied, since an average of unit vectors is none.
        """
        decay = min(self.decay, step / (step + 9))
        ours, theirs = self.network.state_dict(), self.source.state_dict()
        averaged = [
            name for name, tensor in ours.items() if tensor.is_floating_point() and not _is_singular_vector(name)
        ]
        if self.foreach:
            torch._foreach_lerp_([ours[name] for name in averaged], [theirs[name] for name in averaged], 1 - decay)
        else:
            for name in averaged:
                ours[name].lerp_(theirs[name], 1 - decay)
        for name in ours.keys() - set(averaged):
            ours[name].copy_(theirs[name])


@contextlib.contextmanager
def singular_vectors_at_rest(networks: Iterable[nn.Module], *, at_rest: bool = True) -> Iterator[None]:
    """In the block spectral norm makes no power iteration: the parts of an update all see the weights of its first."""
    norms = [
        module
        for network in networks
        for module in network.modules()
        if at_rest and module.training and isinstance(module, parametrizations._SpectralNorm)
    ]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def _is_singular_vector(name: str) -> bool:
    return name.endswith(("parametrizations.weight.0._u", "parametrizations.weight.0._v"))


class TrainingState:
    """Networks, their optimisers, averages, and the clock.

    Args:
        networks: By the names under which a checkpoint holds them; optimisers[name] belongs to networks[name].
        averages: By name; a checkpoint holds their networks beside the trained ones.
        numbers: What else the task must remember, by name: tensors on the CPU, which it changes in place.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        optimisers: Mapping[str, torch.optim.Optimizer],
        averages: Mapping[str, ExponentialAverage],
        numbers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.networks, self.optimisers, self.averages = dict(networks), dict(optimisers), dict(averages)
        self.numbers = dict(numbers or {})
        self.images_seen = 0
        self.seconds = 0.0  # of training, over all legs

    def finish_step(self, batch_size: int) -> None:
        """After all updates of a step: the averages and the clock."""
        self.images_seen += batch_size
        for average in self.averages.values():
            average.update(self.images_seen // batch_size)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name in a checkpoint."""
        out = {f"number.{name}": tensor for name, tensor in self.numbers.items()}
        modules = self.networks | {name: average.network for name, average in self.averages.items()}
        for name, network in modules.items():
            out.update({f"{name}.{key}": tensor for key, tensor in network.state_dict().items()})
        for name, optimiser in self.optimisers.items():
            for parameter_name, parameter in self.networks[name].named_parameters():
                for key, value in optimiser.state.get(parameter, {}).items():
                    out[f"optimiser.{name}.{parameter_name}.{key}"] = torch.as_tensor(value)
        return out

    def moments_of_a_part(self) -> list[Tensor]:
        """Running moments that a process makes of its own images alone: those of normalization over a batch."""
        return [
            buffer
            for network in self.networks.values()
            for module in network.modules()
            if not (isinstance(module, BatchNorm2d) and module.is_shared and module.group is None)
            for name, buffer in module.named_buffers(recurse=False)
            if name in ("running_mean", "running_var")
        ]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`: raises RuntimeError where names or shapes differ."""
        numbers = below(tensors, "number.")
        if numbers.keys() != self.numbers.keys():
            raise RuntimeError(f"it remembers {sorted(numbers)}; expected {sorted(self.numbers)}")
        for name, number in self.numbers.items():
            number.copy_(numbers[name])
        modules = self.networks | {name: average.network for name, average in self.averages.items()}
        for name, network in modules.items():
            network.load_state_dict(below(tensors, f"{name}."))
        for name, optimiser in self.optimisers.items():
            states: dict[int, dict[str, Tensor]] = {}
            started = any(key.startswith(f"optimiser.{name}.") for key in tensors)  # before its first step it has none
            names = {parameter: name for name, parameter in self.networks[name].named_parameters()}
            in_order = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            for index, parameter in enumerate(in_order):  # as the optimiser numbers them
                parameter_name = names[parameter]
                fields = below(tensors, f"optimiser.{name}.{parameter_name}.")
                if started and fields.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                    raise RuntimeError(f"optimiser.{name}.{parameter_name} has {sorted(fields)}; expected Adam's state")
                # Fused Adam pairs numbers by their place in memory: a moment must lie as its parameter does, or
                # channels_last would go on with the moments of other weights.
                states[index] = {
                    key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in fields.items()
                }
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states if started else {}})


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
