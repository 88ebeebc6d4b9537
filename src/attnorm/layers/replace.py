"""AN in a network that is not ours: in place of its norms, or after any of its modules."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.observe import uncompiled_name

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

    @property
    def blocks(self) -> list[nn.Module]:
        """What is new, each once: for an optimizer's groups, or the sum of AN's `orthogonality_penalty()`."""
        return list(dict.fromkeys(change.new for change in self.made))

    def __iter__(self) -> Iterator[Change]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)

    def __str__(self) -> str:
        parameters = sum(parameter.numel() for block in self.blocks for parameter in block.parameters())
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
    that stands in two places is replaced by one in both.

    First load the norms' weights, whose shapes AN's do not have, and convert norms (SyncBatchNorm). Make the optimizer
    and wrap the network (DistributedDataParallel) afterwards; torch.compile may come before or after.

    Args:
        model: The network, changed in place. The norm must not be `model` itself.
        target: A class or classes of norms, whose subclasses count too; a pattern of module names such as
            "decoder.*.norm?" (`*` passes over dots); or a function of (name, module), as for all group norms but those
            of attention, which get no maps: `lambda name, module: isinstance(module, nn.GroupNorm) and "attentions"
            not in name`.
        **options: Of AttentiveNorm2d, beside the number of features.

    Raises:
        ValueError: nothing is named by `target`, what is named is no norm of feature maps or does more than to
            normalize, or is `model` itself; `model` is wrapped for several processes.
    """
    places = _places(model, target)
    _refuse_root(model, places)
    blocks: dict[nn.Module, AttentiveNorm2d] = {}
    made = []
    for path, norm in places:
        name = uncompiled_name(path)
        if norm not in blocks:
            if isinstance(norm, AttentiveNorm2d):
                raise ValueError(f"{name} is an AttentiveNorm2d already")
            blocks[norm] = _like(model, path, AttentiveNorm2d(_norm_features(name, norm), **options))
            blocks[norm].place = name
        made.append(Change(name, norm, blocks[norm], _carry_over(norm, blocks[norm])))
    undo: list[Callable[[], None]] = []
    for (path, _), change in zip(places, made, strict=True):  # only now, that nothing can fail
        parent, _, attribute = path.rpartition(".")
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
    bit. (In training mode AN draws positions from torch's generator: dropout that comes later drops others.) The module
    stays what it was, with the names of its weights, so checkpoints of before still load (with strict=False); its class
    becomes a subclass of the same name. The block is its child `inserted`: it is saved with it and has its mode.

    SyncBatchNorm's conversion keeps the block (and `undo` comes before it, for it is of the modules that were there);
    whatever else makes modules anew, such as frozen or fused norms, comes first. Make the optimizer and wrap the
    network (DistributedDataParallel) afterwards; torch.compile may come before or after.

    Args:
        model: The network, changed in place.
        target: As for `replace`. The modules return one feature map, [N, C, H, W].
        block: Makes another block for C channels, such as attnorm.SelfAttention2d; takes and returns a feature map.
            C is what the module says, or the last one in it that does; `lambda _: AttentiveNorm2d(64)` knows better.
        **options: Of AttentiveNorm2d, beside the number of features; none where there is a `block`.

    Raises:
        ValueError: nothing is named by `target`, the number of channels that a module returns cannot be told, a block
            follows it already, its forward was exchanged, it is a container other than a Sequential, or `model` is
            wrapped for several processes.
    """
    if block is not None and options:
        raise ValueError(f"got a block, and options for AN ({', '.join(options)}); expected one of them")
    make = block or (lambda features: AttentiveNorm2d(features, **options))
    made: list[Change] = []
    for path, module in {module: (path, module) for path, module in reversed(_places(model, target))}.values():
        name = uncompiled_name(path)
        if INSERTED in module._modules:
            raise ValueError(f"{name or 'the network'} is followed by a block already, its child {INSERTED!r}")
        if "forward" in vars(module):
            raise ValueError(
                f"{name or 'the network'} has another forward than its class's, as accelerate's hooks give it; "
                "insert the block before that"
            )
        if isinstance(module, _CONTAINERS) and type(module).forward is not nn.Sequential.forward:
            raise ValueError(
                f"{name or 'the network'} is {type(module).__name__}, whose modules are gone through one by one: the "
                "block would be one of them; name one inside it, such as the last, or the module around it"
            )
        new = _like(model, path, make(_returned_features(name, module)))
        if isinstance(new, AttentiveNorm2d):
            new.place = f"{name}.{INSERTED}" if name else INSERTED
        made.insert(0, Change(name, module, new))
    undo: list[Callable[[], None]] = []
    for change in made:
        change.old.__class__ = _followed(type(change.old))
        change.old.add_module(INSERTED, change.new)
        undo.append(partial(_take_out, change.old))
    return Changes(made, undo)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FOLLOWED: dict[Any, type[nn.Module]] = {}


def _followed(kind: Any) -> type[nn.Module]:
    """The class `kind` whose modules hand what they return to their child `inserted`.

    A class and not a forward hook: what torch.compile compiled of a module without a hook it runs for one with a hook
    too, and so the network, or another one of its kind, would go on without the block.
    """
    if kind in _FOLLOWED:
        return _FOLLOWED[kind]
    if set(kind.__mro__) & set(_FOLLOWED.values()):  # one already, or what torch has made of one
        return kind

    def forward(self: nn.Module, *args: Any, **keywords: Any) -> Tensor:
        output: Any = kind.forward(self, *args, **keywords)
        block = self._modules.get(INSERTED)
        if block is None:  # taken out, where torch.nn.utils.parametrize has made a class of this one
            return output
        if not isinstance(output, Tensor | torch.fx.Proxy):
            place = getattr(block, "place", "").removesuffix(INSERTED).rstrip(".") or "the module"
            raise ValueError(
                f"{place} ({kind.__name__}) returned {type(output).__name__}; expected a feature map [N, C, H, W]: "
                "undo, and name a module inside it that returns one"
            )
        result: Tensor = block(output)
        return result

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _make_followed, (kind,), self.__getstate__()

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods: dict[str, Any] = {"__reduce_ex__": reduce}
    if kind.forward is not nn.Sequential.forward:  # which runs all children, the block as the last
        methods["forward"] = forward
    if getattr(kind, "cls_to_become", None):  # of a lazy module, in its first pass
        methods["cls_to_become"] = _followed(kind.cls_to_become)
    if not _FOLLOWED:  # torch's hook is for the whole process: nobody has it who inserts nothing
        nn.modules.module.register_module_module_registration_hook(_follow_anew)
    _FOLLOWED[kind] = type(kind.__name__, (kind,), {**names, **methods})
    return _FOLLOWED[kind]


def _follow_anew(module: nn.Module, name: str, _: nn.Module | None) -> None:
    """SyncBatchNorm's conversion hands on a norm's children; a norm has none but what was inserted."""
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    if is_norm and name == INSERTED:
        module.__class__ = _followed(type(module))


def _make_followed(kind: type[nn.Module]) -> nn.Module:
    """What copies and pickles begin with: the name of the class is `kind`'s."""
    return object.__new__(_followed(kind))


def _take_out(module: nn.Module) -> None:
    delattr(module, INSERTED)
    kinds: dict[type[nn.Module], Any] = {followed: kind for kind, followed in _FOLLOWED.items()}
    module.__class__ = kinds.get(type(module), type(module))


def _places(model: nn.Module, target: Target) -> list[tuple[str, nn.Module]]:
    """Every path in `model` that `target` names, with its module; one that stands in two places comes twice."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "got DistributedDataParallel, which would not average the gradients of parameters that come later; "
            "change the network before it is wrapped"
        )
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
    # Without what torch.compile puts around a module.
    everything = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if "_orig_mod" not in module._modules
    ]
    # What is inside a block of ours is not the network's.
    inside = [f"{path}." for path, module in everything if isinstance(module, AttentiveNorm2d)]
    found = [
        (path, module)
        for path, module in everything
        if matches(uncompiled_name(path), module) and not any(path.startswith(prefix) for prefix in inside)
    ]
    if not found:
        raise ValueError(_nothing(model, target, [(uncompiled_name(path), module) for path, module in everything]))
    return found


def _nothing(model: nn.Module, target: Target, everything: list[tuple[str, nn.Module]]) -> str:
    """What to say where `target` names nothing: with the network's norms, those alike as one pattern of names."""
    norms: dict[str, list[str]] = {}
    for name, module in everything:
        if _is_norm(module):
            alike = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            norms.setdefault(f"{alike} ({type(module).__name__})", []).append(f"{name} ({type(module).__name__})")
    examples = [names[0] if len(names) == 1 else f"{len(names)} x {alike}" for alike, names in norms.items()]
    if len(examples) > 16:
        examples[16:] = [f"and {len(examples) - 16} others"]
    if isinstance(target, str) and target in {type(module).__name__ for _, module in everything}:
        what = f"{target!r} is taken for a pattern of names; a class is given as the class itself, without quotes. It"
    else:
        what = f"the pattern {target!r}" if isinstance(target, str) else f"target {target!r}"
    return (
        f"{what} names no module of {type(model).__name__}; its norms: {', '.join(examples) or 'none that are known'}"
    )


def _refuse_root(model: nn.Module, places: list[tuple[str, nn.Module]]) -> None:
    if not all(uncompiled_name(path) for path, _ in places):
        raise ValueError(f"{type(model).__name__} itself is named; it has no parent in which AN could take its place")


def _is_norm(module: nn.Module) -> bool:
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return isinstance(module, known) or (hasattr(module, "weight") and "norm" in type(module).__name__.lower())


def _norm_features(name: str, norm: nn.Module) -> int:
    """C of a norm of feature maps."""
    kind = type(norm).__name__
    other_maps = nn.BatchNorm1d | nn.BatchNorm3d | nn.InstanceNorm1d | nn.InstanceNorm3d
    # Those for maps are called LayerNorm2d, by torchvision and timm.
    is_of_last_dimension = isinstance(norm, nn.LayerNorm | nn.RMSNorm) and "2d" not in kind.lower()
    features = _stated(norm)
    if features is None or not _is_norm(norm) or isinstance(norm, other_maps) or is_of_last_dimension:
        raise ValueError(f"{name} is {kind}; expected a norm of feature maps [N, C, H, W] that says its channels")
    inside = [
        f"{child} ({type(module).__name__})"
        for child, module in norm.named_children()
        if not isinstance(module, nn.Identity)
    ]
    if inside:
        raise ValueError(
            f"{name} is {kind}, which applies {', '.join(inside)} too: lost, were AN in its place; use insert_after"
        )
    parameters = inspect.signature(norm.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(required) > 1:
        raise ValueError(
            f"{name} is {kind}, which is called with ({', '.join(required)}); AN takes a feature map alone"
        )
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


def _like(model: nn.Module, path: str, block: Block) -> Block:
    """`block` in the mode of the module at `path`, on its device and in its dtype; a module without tensors, such as
    an InstanceNorm2d, has those of the nearest one around it.
    """
    block.train(model.get_submodule(path).training)
    while True:
        module = model.get_submodule(path)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return block.to(tensor.device, tensor.dtype)
        if not path:
            return block
        path = path.rpartition(".")[0]


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
