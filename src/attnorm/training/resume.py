"""Whether a command goes on with the run that is there, and from which checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnorm.checkpoint import CheckpointError, read_checkpoint, read_header
from attnorm.config import Config, ConfigError, RunConfig
from attnorm.data.images import ImageSet
from attnorm.data.stream import parts_of_batch
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.settings import MAY_CHANGE_ON_RESUME, flatten
from attnorm.system.devices import device_name, find_precision
from attnorm.system.process_group import ProcessGroup, find_own_device
from attnorm.training.state import TrainingState, below


def require_trainable(config: Config, out: Path, group: ProcessGroup = ProcessGroup()) -> None:  # noqa: B008
    """What can be told before the data are read: device, place, processes, and settings of a run that is there.

    Raises:
        ConfigError, CheckpointError: as `train` would.
    """
    find_own_device(config.run.device)
    require_possible(config.run, group)
    run = RunDirectory(out)
    run.require_free_or_run()
    if run.checkpoints():
        require_same_settings(run, config)
    elif config.run.start_from:
        find_checkpoint(config.run.start_from)


def require_possible(settings: RunConfig, group: ProcessGroup) -> None:
    """ConfigError where the processes cannot share a batch, or its moments, as the settings say, or log as they say."""
    if settings.wandb and find_spec("wandb") is None:
        raise ConfigError(f"run.wandb is {settings.wandb!r}, but wandb is not installed: pip install wandb")
    parts_of_batch(settings.batch_size, processes=group.count, accumulate=settings.accumulate)
    if group.count % (settings.batch_norm_group or group.count):
        raise ConfigError(
            f"run.batch_norm_group is {settings.batch_norm_group}: {group.count} processes are no multiple of it; "
            "expected 0 for all of them, or a number that divides theirs"
        )


def require_same_settings(run: RunDirectory, config: Config) -> None:
    """The number of classes is the data's: that these are the run's is for `open_run` to see.

    Raises:
        ConfigError: the run was made with others; the message names each with both values.
    """
    old, new = effective_settings(run.read()[0]), effective_settings(config)
    is_open = MAY_CHANGE_ON_RESUME | {"model.num_classes"}
    changed = [key for key in new if old.get(key) != new[key] and key not in is_open]
    if changed:
        differences = ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in changed)
        same = "the same settings"
        if not {"preset", "task", "recipe"} & set(changed):
            same += " (--set " + " ".join(f"{key}={_as_text(old[key])}" for key in changed if key in old) + ")"
        raise ConfigError(f"{run.path} holds another run: {differences}; give {same}, or another --out")


def _as_text(value: Any) -> str:
    """As `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_as_text, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def effective_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name: tau as the layers get it, and nothing of AN where there is none."""
    settings = flatten(config)
    if not config.model.context.startswith("an"):
        return {name: value for name, value in settings.items() if not name.startswith("model.an.")}
    return settings | {"model.an.temperature": config.model.temperature}


def open_run(run: RunDirectory, config: Config, images: ImageSet) -> tuple[Path | None, list[str]]:
    """Creates the run directory, or finds its last good checkpoint; and what is to be said of that.

    Raises:
        ConfigError, CheckpointError: it belongs to other settings or data, or cannot be used.
    """
    data = {
        "source": images.source,
        "num_images": len(images),
        "classes": list(images.classes),
        "fingerprint": images.fingerprint,
        "note": images.note,
    }
    said = run.set_aside_damaged(affordable=config.run.checkpoint_every_images)
    if not run.checkpoints():  # a run that never got so far may have had settings that cannot work
        _require_nothing_to_lose(run)
        run.create(config, data)
        return None, said
    require_same_settings(run, config)
    _, old_data = run.read()
    if old_data["fingerprint"] != data["fingerprint"]:
        raise ConfigError(
            f"{run.path} was trained on other data ({old_data['num_images']} images of {old_data['source']}, now "
            f"{data['num_images']} of {data['source']}); give the same data, or another --out"
        )
    return run.checkpoints()[-1], said


def _require_nothing_to_lose(run: RunDirectory) -> None:
    """ConfigError where the log is of more than a checkpoint, and none is there: deleted, perhaps, to save space."""
    if not run.exists():
        return
    logged = max((row["images_seen"] for row in run.read_metrics()), default=0)
    if logged > run.read()[0].run.checkpoint_every_images:
        raise ConfigError(
            f"{run.path} holds the log of {logged:,} images of training, and no checkpoint: a new run would erase it; "
            "choose another --out, or remove the folder"
        )


def precision_of_leg(
    name: Literal["float32", "bfloat16", "auto"], checkpoint: Path, device: torch.device
) -> tuple[Literal["float32", "bfloat16"], list[str]]:
    """In which a run goes on from `checkpoint`, and what is to be said of that: "auto" stays at float32 where it was
    that, whatever this device has units for; what was bfloat16 goes on in float32 where it has none.
    """
    precision, before = find_precision(name, device), read_header(checkpoint).config.run.precision
    if name != "auto" or before in ("auto", precision):
        return precision, []
    if before == "float32":
        return "float32", []
    return precision, [f"so far in {before}, for which {device_name(device)} has no units: from here in {precision}"]


def start_from(
    path: str, state: TrainingState, classes: tuple[str, ...], *, temperature: float | str | None = None
) -> list[str]:
    """Gives the networks of `state` the weights of another run or of a model, and leaves optimisers and clock at their
    start; what is to be said of it. Where there is an average alone, generator and average have that, and the other
    networks stay as they are, as does a judge of images of another size. Of another number of classes, so does what
    there is one of for each class.

    Args:
        temperature: What AN's tau is to be; None: whatever the weights were trained with.

    Raises:
        CheckpointError: it cannot be used, or is of other networks, or of another tau.
    """
    checkpoint = find_checkpoint(path)
    tensors, header = read_checkpoint(checkpoint)
    tau = header.config.model.temperature
    if temperature not in (None, tau) and header.config.model.context.startswith("an"):
        raise CheckpointError(
            f"run.start_from: AN in {checkpoint} was trained with a tau of {tau}, and is to have {temperature}: its "
            f"layouts would be others; give --set model.an.temperature={tau}, or start from another"
        )
    networks = state.networks | {name: average.network for name, average in state.averages.items()}
    parts = {name: below(tensors, f"{name}.") for name in networks}
    parts["generator"] = parts["generator"] or dict(parts["ema"])
    new: list[str] = []
    for name, network in networks.items():
        if not parts[name]:
            new.append(f"the {name}")
            continue
        if len(header.classes) != len(classes):
            sizes, theirs = (len(header.classes), len(classes)), parts[name]
            of_classes = {
                key: tensor
                for key, tensor in network.state_dict().items()
                if key in theirs and _axes_that_differ(theirs[key], tensor) == [sizes]
            }
            parts[name] |= of_classes
            new += [f"what the {name} has of each class"] if of_classes else []
        if name not in ("generator", *state.averages) and _differs_in_shape(network, parts[name]):
            new.append(f"the {name}, for another size of image")
            continue
        try:
            network.load_state_dict(parts[name])
        except RuntimeError as error:
            raise CheckpointError(f"run.start_from: {checkpoint} has another {name}: {error}") from error
    what = f"; new: {', '.join(new)}" if new else ""
    return [f"starts from {checkpoint}, trained with {header.images_seen:,} images{what}"]


def _axes_that_differ(theirs: Tensor, ours: Tensor) -> list[tuple[int, int]]:
    """Both sizes of each; [] too where there are not as many axes."""
    if theirs.dim() != ours.dim():
        return []
    return [pair for pair in zip(theirs.shape, ours.shape, strict=True) if pair[0] != pair[1]]


def _differs_in_shape(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether it has the names of `tensors`, but not all of the shapes: a linear layer over a map of another size."""
    own = network.state_dict()
    return own.keys() == tensors.keys() and any(own[name].shape != tensors[name].shape for name in own)


def load_state(checkpoint: Path, state: TrainingState, *, processes: int = 1) -> list[str]:
    """Brings `state` to a checkpoint; what is to be said: why what follows is not, bit for bit, as without a stop.

    Raises:
        CheckpointError: it cannot be used, or is of other networks.
    """
    tensors, header = read_checkpoint(checkpoint)
    try:
        state.load_tensors(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit its run: {error}") from error
    state.images_seen, state.seconds = header.images_seen, header.seconds
    threads = torch.get_num_threads()
    if header.processes != processes:
        return [
            f"the run went so far in {header.processes} process(es) and goes on in {processes}: the same images and "
            "random numbers, but sums in another order, so not to the last bit as without a stop"
        ]
    if header.threads in (0, threads):
        return []
    return [
        f"the run went so far with {header.threads} threads and goes on with {threads}: its numbers are rounded "
        f"otherwise, not as without a stop (OMP_NUM_THREADS={header.threads} would go on with as many)"
    ]
