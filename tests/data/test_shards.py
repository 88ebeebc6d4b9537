"""Tar shards give what a folder gives; processes that decode change no byte, and memory does not grow."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnorm.data import decode_cache, shards
from attnorm.data.decoding import Decoders, Frame
from attnorm.data.images import ImageSet, load_images
from attnorm.data.sources import find_source

SIZE = 8


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "cache"))


def png(seed: int, size: int = SIZE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def seeds_of(data: ImageSet) -> list[int]:
    """Which of the images 0 to 19 they are."""
    known = {decoded(png(seed)): seed for seed in range(20)}
    return [known[image.tobytes()] for image in data.images]


def decoded(data: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).tobytes()


def named(data: ImageSet) -> list[str]:
    return [data.classes[label] for label in data.labels]


def test_what_stands_beside_an_image_is_its_class(tmp_path: Path) -> None:
    """.cls before .json, either before a folder; images come in the order of the shards, the tenth after the second."""
    shard(tmp_path / "set" / "s-2.tar", {"b.png": png(3), "b.cls": b"7\n", "b.json": b'{"label": 5}'})
    shard(tmp_path / "set" / "s-10.tar", {"c.json": b'{"cls": 5, "class": "cat"}', "c.png": png(1), "d.1.png": png(4)})
    shard(tmp_path / "set" / "s-1.tar", {"x/e.png": png(2), "x/e.mask.png": png(0), "x/e.txt": b"", "y/e.png": png(5)})
    data = load_images(tmp_path / "set", SIZE)
    assert seeds_of(data) == [2, 5, 3, 1] and named(data) == ["x", "y", "7", "cat"]
    assert data.skipped == (
        "s-1.tar/x/e.txt: not an image file, by its name",
        "s-1.tar/x/e.mask.png: stands beside x/e.png",
        "s-10.tar/d.1.png: has no class",
    )


def test_class_folders_in_shards_are_those_of_the_folder(tmp_path: Path) -> None:
    files = {f"set/{name}/{seed}.png": png(seed) for name, seed in [("cat", 1), ("cat", 2), ("dog", 3)]}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder, one = load_images(tmp_path / "set", SIZE), load_images(shard(tmp_path / "one.tar", files), SIZE)
    assert one.fingerprint == folder.fingerprint and one.classes == ("cat", "dog")
    flat = load_images(shard(tmp_path / "pets-0.tar", {"./1.png": png(1)}).with_name("pets-{0..0}.tar"), SIZE)
    assert flat.classes == ("pets",)
    split = shard(tmp_path / "two.tar", {"train/a/1.png": png(1), "val/a/2.png": png(2)})
    with pytest.raises(ValueError, match="train and val: splits of a data set"):
        load_images(split, SIZE)


def test_a_range_names_shards_and_all_of_them_must_be_there(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        shard(tmp_path / f"s-{number:03}.tar", {"a.png": png(number), "a.cls": b"c"})
    assert seeds_of(load_images(str(tmp_path / "s-{009..010}.tar"), SIZE)) == [9, 10]
    with pytest.raises(ValueError, match=r"s-007\.tar does not exist: 2 of the 5 shards"):
        load_images(str(tmp_path / "s-{007..011}.tar"), SIZE)


def test_shards_are_read_once_to_find_any_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "s.tar", {f"{seed}.png": png(seed) for seed in range(20)})
    load_images(path, SIZE)
    with monkeypatch.context() as patch, find_source(path).open() as contents:
        patch.setattr(shards, "_add", lambda *_: pytest.fail("indexed again"))
        assert contents.read is not None and contents.read(13) == png(13)
        load_images(path, 4)
    (index,) = (tmp_path / "cache").glob("shards-*.json")
    index.write_text(index.read_text().replace('"offsets":[512', '"offsets":[99999999'))
    assert len(load_images(path, 5)) == 20  # a lying index is made again
    shard(path, {"0.png": png(7)})
    assert seeds_of(load_images(path, SIZE)) == [7]


def test_what_cannot_be_sought_or_is_damaged_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"a.png": png(1), "b.png": png(2)})
    path.write_bytes(path.read_bytes()[: 512 + len(png(1)) // 2])
    with pytest.raises(ValueError, match=r"s\.tar is a damaged shard \(unexpected end of data\)"):
        load_images(path, SIZE)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(path, "a.png")
    with pytest.raises(ValueError, match=r"or make it a \.tar without compression"):
        load_images(tmp_path / "s.tar.gz", SIZE)


# Many images


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cache, "_MANY", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


def test_processes_change_no_byte_and_no_reason(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    files = {f"{number:03}.png": png(number, 4 + number % 9) for number in range(70)}
    files |= {"030.png": b"no image", "031.png": png(1)[:-30], "032.png": b""}
    path = shard(tmp_path / "s.tar", files)
    serial = load_images(path, SIZE, cache_dir=tmp_path / "serial")
    request.getfixturevalue("in_processes")
    parallel = load_images(path, SIZE, cache_dir=tmp_path / "parallel")
    assert len(serial) == 67 and (parallel.fingerprint, parallel.skipped) == (serial.fingerprint, serial.skipped)
    written = [next((tmp_path / name).glob("*.npy")).read_bytes() for name in ("serial", "parallel")]
    assert written[0] == written[1]
    again = load_images(path, SIZE, cache_dir=tmp_path / "parallel")
    notes = {images.note for images in (serial, parallel, again)}
    assert notes == {"31 of 67 images are smaller than 8 pixels, and were enlarged."}


def test_an_image_that_kills_its_process_is_named_and_the_next_is_decoded() -> None:
    with Decoders(Frame(SIZE), 1) as decoders:
        assert decoders.pixels(png(1)) == (decoded(png(1)), False)
        process = decoders.free.get()
        assert process is not None
        process.kill()
        process.wait()
        decoders.free.put(process)
        with pytest.raises(MemoryError, match="has died"):
            decoders.pixels(png(1))
        assert decoders.pixels(png(2)) == (decoded(png(2)), False)


DECODE = """
import signal, sys, time
from pathlib import Path
from attnorm.data import decode_cache
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
decode_cache._MANY = 100
def say(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[4]))
decode_cache.load_decoded(sys.argv[1], int(sys.argv[2]), "square", Path(sys.argv[3]), 0, say)
print(*[line.strip() for line in open("/proc/self/status") if line.startswith("VmHWM")])
print("torch" in sys.modules)
"""


@contextlib.contextmanager
def decoding(source: Path, size: int, cache: Path, pause: float = 0) -> Iterator[subprocess.Popen[str]]:
    """Seconds of `pause` after each image."""
    with subprocess.Popen(
        [sys.executable, "-c", DECODE, source, str(size), cache, str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def children_of(parent: int) -> set[int]:
    return set(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_asks_and_a_build_begins_anew(tmp_path: Path, number: signal.Signals) -> None:
    path, image = tmp_path / "s.tar", png(1, 64)
    shard(path, {f"{i}.png": image for i in range(1000)})
    with decoding(path, 64, tmp_path / "cache", pause=50) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        workers = children_of(process.pid)
        assert workers
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == -number
    end = time.monotonic() + 30
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(lives, workers))
    assert not list((tmp_path / "cache").glob("images*.npy"))
    assert len(load_images(path, 64)) == 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """12 KiB of pixels each: 4,000 more would be 47 MiB; of names and labels there may be 1 KiB each."""
    image, peaks = png(1, 16), []
    for count in (2000, 6000):
        shard(tmp_path / f"{count}.tar", {f"{i}.png": image for i in range(count)})
        with decoding(tmp_path / f"{count}.tar", 64, tmp_path / "cache") as process:
            *_, peak, has_torch = process.communicate(timeout=300)[0].splitlines()
        assert has_torch == "False"
        peaks.append(int(peak.split()[1]))
    assert peaks[1] - peaks[0] < 4000
