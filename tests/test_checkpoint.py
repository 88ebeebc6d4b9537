"""Checkpoints and run directories: what is written comes back, what cannot be used is refused in words."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from attnorm.checkpoint import (
    CheckpointError,
    DamagedError,
    Header,
    checksum,
    find_damage,
    read_checkpoint,
    save_checkpoint,
)
from attnorm.config import FORMAT_VERSION, Config, ConfigError, UserError
from attnorm.registry import load
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.settings import override, to_dict
from attnorm.system.devices import find_device
from attnorm.system.files import file_lock, read_lines, write_atomically, write_json
from attnorm.training.class_conditional import ClassConditionalTask

CONFIG = override(
    Config(),
    ["model.image_size=32", "model.num_classes=3", "model.width=2", "model.latent_dim=4", "data.source=photographs"],
)
HEADER = Header(CONFIG, ("cat", "dög", "a/b"), 64_000, 12.5, "few images")


def task_with_random_weights() -> ClassConditionalTask:
    """The weights, their average and the discriminator all differ."""
    torch.manual_seed(0)
    task = ClassConditionalTask(CONFIG, torch.device("cpu"))
    with torch.no_grad():
        for parameter in (*task.generator.parameters(), *task.discriminator.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClassConditionalTask]:
    """A run directory with one checkpoint, and the task that it holds."""
    run = RunDirectory(tmp_path_factory.mktemp("saved") / "run")
    task = task_with_random_weights()
    run.create(CONFIG, {"fingerprint": "abc"})
    save_checkpoint(run.checkpoint_file(64_000), task.state.tensors(), HEADER)
    return run.path, task


def store(path: Path, **changes: Any) -> Path:
    """A checkpoint of one tensor whose header is changed."""
    values = {"format_version": FORMAT_VERSION, "config": to_dict(CONFIG), "classes": ["a"], "images_seen": 1}
    values |= {"seconds": 0.5, **changes}
    safetensors.torch.save_file({"ema.x": torch.zeros(1)}, path, {"attnorm": json.dumps(values)})
    return path


# Files


def test_tensors_and_header_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T,
        "a.count": torch.tensor(7),
        "b.half": torch.tensor([1.5, -3e38], dtype=torch.bfloat16),
        "b.map": torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
    }
    save_checkpoint(tmp_path / "x.safetensors", tensors, HEADER)
    read, header = read_checkpoint(tmp_path / "x.safetensors")
    assert header == HEADER
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_prefix_selects_and_is_cut_off(tmp_path: Path) -> None:
    tensors = {"ema.a": torch.ones(1), "ema.ema.b": torch.ones(2), "generator.a": torch.zeros(1)}
    save_checkpoint(tmp_path / "x.safetensors", tensors, HEADER)
    read, _ = read_checkpoint(tmp_path / "x.safetensors", prefix="ema.")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"a": [1.0], "ema.b": [1.0, 1.0]}


def test_a_file_that_is_no_checkpoint_or_half_of_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.zeros(100)}, HEADER)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint at all", b"\x80\x04\x95pickled", whole[:4], whole[:100], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read as a checkpoint.*earlier one"):
            read_checkpoint(path)


def test_a_safetensors_file_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata in (
        None,
        {"format": "pt"},
        *({"attnorm": text} for text in ("{}", "[1]", "{", '{"format_version": 1}')),
    ):
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
        is_ours = metadata and "attnorm" in metadata
        with pytest.raises(CheckpointError, match=r"x\.safetensors" if is_ours else "not a checkpoint of attnorm"):
            read_checkpoint(path)


def test_a_newer_format_asks_for_a_newer_version(tmp_path: Path) -> None:
    path = store(tmp_path / "x.safetensors", format_version=FORMAT_VERSION + 1, config={"unheard": "of"})
    with pytest.raises(CheckpointError, match=f"has format {FORMAT_VERSION + 1}.*update attnorm"):
        read_checkpoint(path)


def test_a_setting_that_this_version_does_not_know_is_named(tmp_path: Path) -> None:
    config = to_dict(CONFIG)
    config["model"]["colour"] = "blue"
    path = store(tmp_path / "x.safetensors", config=config)
    with pytest.raises(UserError, match=r"model\.colour"):
        read_checkpoint(path)


def test_a_checkpoint_without_newer_settings_is_read(tmp_path: Path) -> None:
    """What an older version did not know takes its default."""
    config = to_dict(CONFIG)
    del config["model"]["site"], config["run"], config["inpainting"], config["task"], config["data"]["fit"]
    _, header = read_checkpoint(store(tmp_path / "x.safetensors", config=config))
    assert header.config == CONFIG and header.note == ""


# Damage


def damage(path: Path, tensor: Tensor, changed: Tensor) -> None:
    """Puts other bytes in the place of a tensor's, as a disk or a hand might."""
    content, old = path.read_bytes(), tensor.numpy().tobytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, changed.numpy().tobytes()))


def test_a_tensor_that_is_not_what_was_written_is_named_and_others_are_read(tmp_path: Path) -> None:
    values = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    flipped = values[0].view(torch.int32).clone()
    flipped[3] ^= 1  # the lowest bit of a mantissa
    for changed in (flipped.view(torch.float32), torch.full((5,), 1e30), torch.full((5,), torch.nan)):
        save_checkpoint(tmp_path / "x.safetensors", {"ema.a": values[0], "raw.b": values[1]}, HEADER)
        assert find_damage(tmp_path / "x.safetensors") == ""
        damage(tmp_path / "x.safetensors", values[0], changed)
        with pytest.raises(DamagedError, match=r"x\.safetensors is damaged: ema\.a is not what was written; take an"):
            read_checkpoint(tmp_path / "x.safetensors")
        assert torch.equal(read_checkpoint(tmp_path / "x.safetensors", prefix="raw.")[0]["b"], values[1])
        assert "ema.a is not what was written" in find_damage(tmp_path / "x.safetensors")


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """In the header, where a number would be another one, as in a tensor; and the checkpoint before is taken."""
    run = RunDirectory(tmp_path / "run")
    run.create(CONFIG, {})
    for number in (8, 16):
        save_checkpoint(run.checkpoint_file(number), {"ema.a": torch.ones(9)}, replace(HEADER, images_seen=number))
    file, draw = run.checkpoint_file(16), random.Random(0)
    whole = file.read_bytes()
    for flipped in range(150):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        os.utime(file, ns=(0, flipped))  # what was found is remembered as long as the file is the same
        try:
            assert find_damage(file), flipped
        except AssertionError:  # but for the name of the checksum itself, without which the header is read as it is
            assert read_checkpoint(file)[1] == replace(HEADER, images_seen=16)
    assert run.latest() == run.checkpoint_file(8)


def test_a_checksum_is_of_type_shape_and_bytes() -> None:
    digest = hashlib.blake2b(b"torch.int16 [2, 1]\x01\x00\x02\x00", digest_size=8).hexdigest()
    assert checksum(torch.tensor([[1], [2]], dtype=torch.int16)) == digest
    assert checksum(torch.tensor([[1], [2]], dtype=torch.int16).T) != digest


def test_weights_that_are_not_finite_are_refused_whatever_the_checksum_says(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", {"ema.a": torch.tensor([0.0, torch.nan])}, HEADER)
    with pytest.raises(DamagedError, match=r"ema\.a is not finite"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_the_checkpoint_before_a_damaged_one_is_taken_and_the_damage_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(CONFIG, {})
    for number in (5, 8, 40):
        store(run.checkpoint_file(number), images_seen=number)
    run.checkpoint_file(40).write_bytes(run.checkpoint_file(8).read_bytes()[:-1])
    assert find_checkpoint(run.path) == run.checkpoint_file(8)
    assert find_checkpoint(str(run.checkpoint_file(5))) == run.checkpoint_file(5)
    assert "000000008.safetensors is taken" in caplog.text and "000000040.safetensors cannot be read" in caplog.text
    run.checkpoint_file(8).write_bytes(b"")
    reasons = run.set_aside_damaged()
    assert [reason.split(" cannot")[0] for reason in reasons] == [str(run.checkpoint_file(n)) for n in (40, 8)]
    assert run.checkpoints() == [run.checkpoint_file(5)]
    assert (run.path / "checkpoints/000000040.safetensors.damaged").is_file()
    run.checkpoint_file(5).write_bytes(b"")
    for refused in (run.latest, run.set_aside_damaged):
        with pytest.raises(CheckpointError, match=r"no checkpoint that can be used: .*000000005\.safetensors"):
            refused()
    assert run.checkpoints() == [run.checkpoint_file(5)]
    with pytest.raises(CheckpointError):
        run.set_aside_damaged(affordable=4)
    (reason,) = run.set_aside_damaged(affordable=5)  # an interval at most is lost: the run begins anew
    assert "kept as 000000005.safetensors.damaged" in reason and run.checkpoints() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": {"model": {"an": [1]}}},
        {"config": {"task": ["inpainting"]}},
        {"config": {"optim": {"g_lr": 10**400}}},
        {"classes": [None]},
        {"images_seen": None},
        {"seconds": float("nan")},
        {"note": 3},
        {"checksums": 3},
        {"format_version": "1"},
    ],
    ids=str,
)
def test_a_header_that_was_edited_is_refused_in_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        read_checkpoint(store(tmp_path / "x.safetensors", **changes))
    assert 0 < len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_nesting_without_end_is_refused_in_words(tmp_path: Path, text: str) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"attnorm": text})
    with pytest.raises(DamagedError, match="damaged header"):
        read_checkpoint(tmp_path / "x.safetensors")
    run = RunDirectory(tmp_path / "run")
    run.create(CONFIG, {})
    run.config_file.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        run.read()
    run.metrics_file.write_text(f'{{"a": 1}}\n{text}\n', encoding="utf-8")
    assert read_lines(run.metrics_file) == [{"a": 1}]


# Atomic writing


def test_a_full_disk_is_an_oserror_that_says_what_where_and_how_much_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        OSError, match=r"x\.safetensors \(1\.0 MiB\) cannot be written, .* MiB are free there: .*No space"
    ):
        save_checkpoint(tmp_path / "x.safetensors", {"a": torch.zeros(2**18)}, HEADER)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half a fi", encoding="utf-8")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path, seen = tmp_path / "x.txt", []

    def write(temporary: Path) -> None:
        temporary.write_text("whole", encoding="utf-8")
        seen.append((path.exists(), temporary.parent == path.parent, temporary.name.startswith(".")))

    write_atomically(path, write)
    assert seen == [(False, True, True)]
    assert path.read_text(encoding="utf-8") == "whole" and path.stat().st_mode & 0o777 == 0o644


# Run directories


def test_checkpoints_are_listed_by_images_seen_and_nothing_else_is(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(CONFIG, {})
    folder = run.path / "checkpoints"
    for number in (999_999_999, 64, 1_280_000_000_000):
        run.checkpoint_file(number).touch()
    unfinished = ".000000128.safetensors.abcd_123.tmp"
    foreign = {"notes.txt", "best.safetensors", "000000128.safetensors.tmp", "000000064-backup.safetensors"}
    foreign |= {"64.safetensors", "0000000064.safetensors", "000000064.safetensors.damaged", ".mine.tmp"}
    for name in (unfinished, *foreign):
        (folder / name).touch()
    assert [int(path.stem) for path in run.checkpoints()] == [64, 999_999_999, 1_280_000_000_000]
    run.keep_last(2)
    assert [int(path.stem) for path in run.checkpoints()] == [999_999_999, 1_280_000_000_000]
    assert set(os.listdir(folder)) == foreign | {path.name for path in run.checkpoints()}


def test_of_a_training_log_that_was_edited_the_rest_is_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    good = {"images_seen": 8, "generator/loss": 1.5, "layout/g.an/usage": [0.25, 0.75], "layout/g.an/t": [0.1]}
    bad = {"generator/x": "a", "generator/y": [1], "generator/z": None, "a/usage": 3, "b/usage": ["a"], "c": {}}
    rows = [good | bad, {"generator/loss": 1.0}, {"images_seen": None}, {"images_seen": "8"}, {"images_seen": 1e400}]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run.read_metrics() == [good]


def test_creating_a_run_where_something_else_is_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder/checkpoints").mkdir(parents=True)
    (tmp_path / "folder/checkpoints/mine.txt").touch()
    for name in ("file", "folder"):
        with pytest.raises(CheckpointError, match="already there and is not a run; choose another --out"):
            RunDirectory(tmp_path / name).create(CONFIG, {})
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty").create(CONFIG, {})


def test_a_damaged_config_file_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(CONFIG, {})
    values = json.loads(run.config_file.read_text(encoding="utf-8"))
    of_data = (None, 3, {"classes": None}, {"classes": ["a", 3]}, {"fingerprint": 3}, {"note": []})
    for text in ("{", "{}", '{"config": {}}', "[]", "null", *(json.dumps(values | {"data": data}) for data in of_data)):
        run.config_file.write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            run.read()
    write_json(run.config_file, values | {"format_version": FORMAT_VERSION + 1})
    with pytest.raises(CheckpointError, match=f"has format {FORMAT_VERSION + 1}; .*update attnorm"):
        run.read()


def test_what_cannot_be_loaded_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    RunDirectory(tmp_path / "run").create(CONFIG, {})
    for name, message in {
        "nowhere": "nowhere does not exist; expected a run directory",
        "notes.txt": r"notes\.txt is no checkpoint; expected a run directory, or a file from",
        "folder": r"folder is not a run directory: it has no config\.json",
        "run": "run has no checkpoint yet; train it first",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(tmp_path / name)


# Loading


def test_networks_load_in_evaluation_mode_as_they_were(saved: tuple[Path, ClassConditionalTask]) -> None:
    path, task = saved
    average, raw = load(path), load(path, ema=False).model
    assert average.classes == ("cat", "dög", "a/b") and average.header == HEADER
    for network in (average.model, raw):
        assert not any(module.training for module in network.modules())
    z, labels = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2])
    with torch.no_grad():
        images = average.model(z, labels)
        assert torch.equal(images, task.average.network(z, labels))
        assert torch.equal(raw(z, labels), task.generator.eval()(z, labels))
        assert (raw(z, labels) - images).abs().max() > 1e-3


def test_tensors_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    task = task_with_random_weights()
    path = tmp_path / "x.safetensors"
    wider = replace(CONFIG, model=replace(CONFIG.model, width=4))
    save_checkpoint(path, task.state.tensors(), replace(HEADER, config=wider))
    with pytest.raises(CheckpointError, match=r"x\.safetensors does not fit the model that its header describes"):
        load(path)
    save_checkpoint(path, task.state.tensors(), replace(HEADER, classes=("cat",)))
    with pytest.raises(CheckpointError, match="names 1 classes for a model of 3"):
        load(path)
    partial = {name: tensor for name, tensor in task.state.tensors().items() if name != "ema.to_rgb.bias"}
    save_checkpoint(path, partial, HEADER)
    with pytest.raises(CheckpointError, match=r"to_rgb\.bias"):
        load(path)


def test_devices_that_are_not_there_are_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match=r"'tpu-ish'; expected auto, cpu, cuda, cuda:1 or mps"):
        find_device("tpu-ish")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds none on this machine; take auto or cpu"):
            find_device("cuda")


def test_where_the_file_system_has_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", without)
    with file_lock(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_a_line_that_a_kill_cut_short_is_left_out_even_within_a_letter(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file) == []
    file.write_bytes('{"a": 1}\n{"name": "Fr\u00e9chet"}\n{"name": "Fr\u00e9'.encode()[:-1])
    assert read_lines(file) == [{"a": 1}, {"name": "Fr\u00e9chet"}]
