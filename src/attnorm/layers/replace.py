"""AN in a network that is not ours: in place of its norms, or after any of its modules."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d

Target = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]

Block = TypeVar("Block", bound=nn.Module)

INSERTED = "inserted"  # the name of a block within the module that it follows


@dataclass(frozen=True)
class Change:
    """One module that gave its place to AN, or is followed by a block now; as text, a line."""

    name: str  # of the module in the network
    old: nn.Module
    new: nn.Module
    remark: str = ""

    def __str__(self) -> str:
        new = f"{type(self.new).__name__}({self.new.extra_repr()})"
        if self.remark:
            return f"{self.name}: {type(self.old).__name__} -> {new}, {self.remark}"
        return f"{self.name}: {type(self.old).__name__} + {new}"


@dataclass
class Changes:
    """What `replace` or `insert_after` did to a network; as text, a line a module and a sum."""

    made: list[Change]
    _undo: list[Callable[[], None]] = field(repr=False)

    def undo(self) -> None:
        """Gives every module its place back, with the weights that it has now. A second call does nothing.

        An optimizer that was made in between still holds the blocks' parameters: make it anew.
        """
        while self._undo:
            self._undo.pop()()

    def __iter__(self) -> Iterator[Change]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)

    def __str__(self) -> str:
        parameters = sum(parameter.numel() for block in {c.new for c in self.made} for parameter in block.parameters())
        total = f"{len(self.made)} places, {parameters:,} parameters in what is new"
        return "\n".join([*(str(change) for change in self.made), total])


def replace(model: nn.Module, target: Target, **options: Any) -> Changes:
    """Puts an AttentiveNorm2d in the place of every norm of `model` that `target` names, and returns what it did::

        changes = attnorm.replace(network, torch.nn.InstanceNorm2d, num_entities=8)
        print(changes)
        changes.undo()

    At the start AN is the identity (rho = 0) where the norm normalized: the network computes something else than
    before and has to be trained, as the paper does it in its residual blocks. To begin with the network's own
    function, use `insert_after`. Scale and shift of the norm become those of every entity, where AN has such
    (`affine=True`); running moments of batch norm have no use and go. Device, dtype and mode are the norm's. A module
    that stands in two places is replaced by one in both. Make the optimizer afterwards.

    Args:
        model: The network, changed in place. The norm must not be `model` itself.
        target: A class or classes of norms, whose subclasses count too; a pattern of module names such as
            "decoder.*.norm?" (`*` passes over dots); or a function of (name, module).
        **options: Of AttentiveNorm2d, beside the number of features.

    Raises:
        ValueError: nothing is named by `target`, what is named is no norm of feature maps, or is `model` itself.
    """
    places = _places(model, target)
    _refuse_root(model, places)
    blocks: dict[nn.Module, AttentiveNorm2d] = {}
    made = []
    for name, norm in places:
        if norm not in blocks:
            if isinstance(norm, AttentiveNorm2d):
                raise ValueError(f"{name} is an AttentiveNorm2d already")
            blocks[norm] = _like(norm, AttentiveNorm2d(_norm_features(name, norm), **options))
        made.append(Change(name, norm, blocks[norm], _carry_over(norm, blocks[norm])))
    undo: list[Callable[[], None]] = []
    for change in made:  # only now, that nothing can fail
        parent, _, attribute = change.name.rpartition(".")
        modules = model.get_submodule(parent)._modules
        modules[attribute] = change.new
        undo.append(partial(modules.__setitem__, attribute, change.old))
    return Changes(made, undo)


def insert_after(
    model: nn.Module, target: Target, block: Callable[[int], nn.Module] | None = None, **options: Any
) -> Changes:
    """Lets a block follow every module of `model` that `target` names, and returns what it did::

        changes = attnorm.insert_after(network, "up.*.norm2", num_entities=16)

    The block is AN, which starts as the identity: until it is trained, the network computes what it did, to the last
    bit. The module keeps its class, attributes and the names of its weights, so checkpoints of before still load
    (with strict=False); the block is its child `inserted`, whose weights are saved with it. Make the optimizer
    afterwards.

    Args:
        model: The network, changed in place.
        target: As for `replace`. The modules return one feature map, [N, C, H, W].
        block: Makes another block for C channels, such as attnorm.SelfAttention2d; takes and returns a feature map.
        **options: Of AttentiveNorm2d, beside the number of features; none where there is a `block`.

    Raises:
        ValueError: nothing is named by `target`, the number of channels that a module returns cannot be told, or a
            block follows it already.
    """
    if block is not None and options:
        raise ValueError(f"got a block, and options for AN ({', '.join(options)}); expected one of them")
    make = block or (lambda features: AttentiveNorm2d(features, **options))
    made: list[Change] = []
    for name, module in {module: (name, module) for name, module in reversed(_places(model, target))}.values():
        if INSERTED in module._modules:
            raise ValueError(f"{name or 'the network'} is followed by a block already, its child {INSERTED!r}")
        made.insert(0, Change(name, module, _like(module, make(_returned_features(name, module)))))
    undo: list[Callable[[], None]] = []
    for change in made:
        change.old.add_module(INSERTED, change.new)
        undo.append(partial(delattr, change.old, INSERTED))
        undo.append(change.old.register_forward_hook(_apply_inserted).remove)
    return Changes(made, undo)


def _apply_inserted(module: nn.Module, _: tuple[Any, ...], output: Any) -> Tensor:
    # A function of the module, and not of the block: so a deep copy of the network calls the copy's block.
    if not isinstance(output, Tensor):
        raise ValueError(f"{type(module).__name__} returned {type(output).__name__}; the block after it wants a tensor")
    result: Tensor = module._modules[INSERTED](output)  # type: ignore[misc]
    return result


def _places(model: nn.Module, target: Target) -> list[tuple[str, nn.Module]]:
    """Every name in `model` that `target` names, with its module; one that stands in two places comes twice."""
    if isinstance(target, str):
        pattern = target
        matches = lambda name, module: fnmatchcase(name, pattern)  # noqa: E731
    elif isinstance(target, type) or (isinstance(target, tuple) and all(isinstance(kind, type) for kind in target)):
        kinds = target
        matches = lambda name, module: isinstance(module, kinds)  # noqa: E731
    elif callable(target):
        matches = target
    else:
        raise ValueError(f"target is {target!r}; expected a class, classes, a pattern of names, or a function")
    everything = list(model.named_modules(remove_duplicate=False))
    # What is inside a block of ours is not the network's.
    inside = [f"{name}." for name, module in everything if isinstance(module, AttentiveNorm2d)]
    found = [
        (name, module)
        for name, module in everything
        if matches(name, module) and not any(name.startswith(prefix) for prefix in inside)
    ]
    if not found:
        what = f"the pattern {target!r}" if isinstance(target, str) else f"target {target!r}"
        examples = ", ".join(f"{name} ({type(module).__name__})" for name, module in everything[1:] if _is_norm(module))
        raise ValueError(
            f"{what} names no module of {type(model).__name__}; its norms: {examples[:300] or 'none that are known'}"
        )
    return found


def _refuse_root(model: nn.Module, places: list[tuple[str, nn.Module]]) -> None:
    if any(module is model for _, module in places):
        raise ValueError(f"{type(model).__name__} itself is named; it has no parent in which AN could take its place")


def _is_norm(module: nn.Module) -> bool:
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return isinstance(module, known) or (hasattr(module, "weight") and "norm" in type(module).__name__.lower())


def _norm_features(name: str, norm: nn.Module) -> int:
    """C of a norm of feature maps."""
    other_maps = nn.BatchNorm1d | nn.BatchNorm3d | nn.InstanceNorm1d | nn.InstanceNorm3d
    features = _stated(norm)
    if features is None or not _is_norm(norm) or isinstance(norm, other_maps):
        raise ValueError(f"{name} is {norm}; expected a norm of feature maps [N, C, H, W] that says its channels")
    return features


def _returned_features(name: str, module: nn.Module) -> int:
    """C of what a module returns: as it says itself, or else the last one inside it that says so."""
    for inner in (module, *reversed(list(module.modules())[1:])):
        features = _stated(inner)
        if features is not None:
            return features
    raise ValueError(
        f"{name or 'the network'} is {type(module).__name__}, which does not say how many channels it returns "
        "(num_features, num_channels, out_channels); name a convolution or norm inside it instead"
    )


def _stated(module: nn.Module) -> int | None:
    """C where a module says what it returns."""
    for attribute in ("num_features", "num_channels", "out_channels"):
        value = getattr(module, attribute, None)
        if isinstance(value, int) and value > 0:
            return value
    weight = getattr(module, "weight", None)
    if _is_norm(module) and isinstance(weight, Tensor) and weight.ndim == 1:  # LayerNorm2d of timm and torchvision
        return len(weight)
    return None


def _like(module: nn.Module, block: Block) -> Block:
    """`block` on the device and in the dtype and mode of `module`."""
    block.train(module.training)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return block.to(tensor.device, tensor.dtype)
    return block


@torch.no_grad()
def _carry_over(norm: nn.Module, block: AttentiveNorm2d) -> str:
    """Scale and shift of `norm` to each entity of `block`; says what came over and what did not."""
    remarks = ["the identity at the start"]
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(scale, Tensor) and block.weight is not None and block.bias is not None:
        block.weight.copy_(scale.detach().expand_as(block.weight))
        if isinstance(shift, Tensor):
            block.bias.copy_(shift.detach().expand_as(block.bias))
        remarks.append("scale and shift carried over")
    elif isinstance(scale, Tensor):
        remarks.append("scale and shift dropped")
    if getattr(norm, "running_mean", None) is not None:
        remarks.append("running moments dropped")
    return ", ".join(remarks)
