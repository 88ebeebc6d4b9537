import errno
import io
import os
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnorm.data import decode_cache as cache
from attnorm.data import images as module
from attnorm.data import sources
from attnorm.data.images import (
    ImageSet,
    cut_centres,
    cut_squares,
    held_out_indices,
    load_images,
    shuffled_indices,
    to_float,
    to_uint8,
)

SIZE = 8


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "cache"))


def pixels(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def chw(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


def two_classes(root: Path) -> Path:
    """Three images: cat (1 and, deeper, 2) and dog (3)."""
    save(root / "dog" / "x.png", pixels(3))
    save(root / "cat" / "a.png", pixels(1))
    save(root / "cat" / "more" / "b.PNG", pixels(2), format="PNG")
    return root


def zip_of(root: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return target


def equal(a: ImageSet, b: ImageSet) -> bool:
    return (
        np.array_equal(a.images, b.images)
        and np.array_equal(a.labels, b.labels)
        and (a.classes, a.skipped, a.fingerprint) == (b.classes, b.skipped, b.fingerprint)
    )


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded although the cache is good")

    monkeypatch.setattr(cache, "_decode_all", fail)


# Sources


def test_class_folders_give_their_pixels_in_sorted_order(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    data = load_images(str(root), SIZE)
    assert len(data) == 3
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1] and data.labels.dtype == np.int64
    assert data.images.dtype == np.uint8
    assert np.array_equal(data.images, np.stack([chw(pixels(seed)) for seed in (1, 2, 3)]))
    assert (data.source, data.skipped, data.note) == (str(root), (), "")


def test_flat_folder_is_one_class_named_after_it(tmp_path: Path) -> None:
    save(tmp_path / "pets" / "2.png", pixels(2))
    save(tmp_path / "pets" / "1.png", pixels(1))
    data = load_images(tmp_path / "pets", SIZE)
    assert data.classes == ("pets",) and data.labels.tolist() == [0, 0]
    assert np.array_equal(data.images, np.stack([chw(pixels(1)), chw(pixels(2))]))


@pytest.mark.parametrize(("prefix", "name"), [("", "birds"), ("pets/", "pets")], ids=["bare", "single-root"])
def test_flat_zip_is_one_class(tmp_path: Path, prefix: Any, name: Any) -> None:
    save(tmp_path / "flat" / "1.png", pixels(1))
    data = load_images(zip_of(tmp_path / "flat", tmp_path / "birds.zip", prefix), SIZE)
    assert data.classes == (name,)
    assert np.array_equal(data.images[0], chw(pixels(1)))


SPELLINGS = {
    "bare": "{}",
    "root": "imagery/{}",
    "dot": "./{}",
    "slash": "/{}",
    "double": "set//{}",
    "windows": "set\\\\{}",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_zip_gives_its_classes_however_its_names_are_spelled(tmp_path: Path, spelling: Any) -> None:
    root = two_classes(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for file in filter(Path.is_file, root.rglob("*")):
            member = zipfile.ZipInfo()
            member.filename = spelling.format(file.relative_to(root).as_posix())
            if "\\" in spelling:
                member.filename = member.filename.replace("/", "\\")
            archive.writestr(member, file.read_bytes())
    assert equal(load_images(tmp_path / "s.zip", SIZE), load_images(root, SIZE))


def test_of_a_name_that_is_twice_in_a_zip_the_last_is_read_and_it_is_said(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    archive = zip_of(root, tmp_path / "s.zip")
    with zipfile.ZipFile(archive, "a") as file:
        member = zipfile.ZipInfo()
        member.filename = "dog\\x.png"
        file.writestr(member, (root / "cat" / "a.png").read_bytes())
    data = load_images(archive, SIZE)
    assert data.skipped == ("dog/x.png: stands in the archive more than once; the last one is read",)
    assert np.array_equal(data.images[2], chw(pixels(1)))


def test_loose_images_beside_class_folders_are_skipped(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    save(root / "loose.png", pixels(9))
    data = load_images(root, SIZE)
    assert len(data) == 3 and data.classes == ("cat", "dog")
    assert data.skipped == ("loose.png: lies beside the class folders, in none",)


def test_hidden_files_are_ignored_and_links_followed(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    save(root / ".cache" / "x.png", pixels(9))
    save(root / "__MACOSX" / "x.png", pixels(9))
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    save(tmp_path / "elsewhere.png", pixels(4))
    (root / "dog" / "y.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "dog" / "z.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog" / "round").symlink_to(root)  # a circle
    data = load_images(root, SIZE)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(data.images[3], chw(pixels(4)))
    assert data.skipped == ("dog/z.png: No such file or directory",)


def cifar_files() -> tuple[dict[str, bytes], np.ndarray]:
    """Two batches of two records with labels 3, 0 and 9, 3, and their images."""
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    records = [bytes([label]) + image.tobytes() for label, image in zip([3, 0, 9, 3], images, strict=True)]
    return {"data_batch_2.bin": records[2] + records[3], "data_batch_1.bin": records[0] + records[1]}, images


def cifar_archive(path: Path, files: dict[str, bytes], folder: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_cifar10_binary_files_are_read_byte_by_byte(tmp_path: Path, kind: Any) -> None:
    files, images = cifar_files()
    files |= {"test_batch.bin": bytes(3073), "readme.html": b""}
    if kind == "archive":
        source = cifar_archive(tmp_path / "cifar-10-binary.tar.gz", files, "cifar-10-batches-bin")
    else:
        source = tmp_path
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    data = load_images(source, 32)
    assert np.array_equal(data.images, images)
    assert [data.classes[label] for label in data.labels] == ["cat", "airplane", "truck", "cat"]
    assert data.skipped[0] == "automobile: no readable image, so it is not a class"


def test_cifar10_class_names_come_from_its_meta_file(tmp_path: Path) -> None:
    files, _ = cifar_files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "batches.meta.txt").write_text("zero\none\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\n\n")
    data = load_images(tmp_path, 32)
    assert data.classes == ("nine", "three", "zero")
    assert data.labels.tolist() == [1, 2, 0, 1]


def test_cifar10_damage_is_an_error(tmp_path: Path) -> None:
    files, _ = cifar_files()
    (tmp_path / "data_batch_1.bin").write_bytes(files["data_batch_1.bin"][:-1])
    with pytest.raises(ValueError, match=r"data_batch_1\.bin .* has 6145 bytes, expected a multiple of 3073"):
        load_images(tmp_path, 32)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match="label 10 but only 10 class names"):
        load_images(tmp_path, 32)


def test_a_batch_of_cifar10_that_is_twice_in_its_archive_is_refused(tmp_path: Path) -> None:
    path = cifar_archive(tmp_path / "c.tar", cifar_files()[0], "a")
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for member, data in members * 2:
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"c\.tar holds data_batch_\d\.bin twice; unpack it"):
        load_images(path, SIZE)


def test_pickled_cifar10_is_refused(tmp_path: Path) -> None:
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b"x"}, "cifar-10-batches-py")
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(b"x")
    for source in (archive, tmp_path / "py"):
        with pytest.raises(ValueError, match=r"pickles .* never read.*cifar-10-binary\.tar\.gz"):
            load_images(source, 32)


def test_wrong_sources_say_what_to_do(tmp_path: Path) -> None:
    two_classes(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"photo does not exist; did you mean photos\? expected 'builtin',"):
        load_images(tmp_path / "photo", SIZE)
    with pytest.raises(ValueError, match="did you mean builtin"):
        load_images("bulitin", SIZE)
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ValueError, match="neither a folder nor an archive"):
        load_images(tmp_path / "note.txt", SIZE)
    other = cifar_archive(tmp_path / "other.tar.gz", {"a.png": b""}, "images")
    with pytest.raises(ValueError, match=r"Unpack any other and name its folder"):
        load_images(other, SIZE)
    with pytest.raises(ValueError, match="image_size=0"):
        load_images(tmp_path / "photos", 0)


# Damage


def test_unreadable_files_are_named_and_not_fatal(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    whole = (root / "cat" / "a.png").read_bytes()
    (root / "cat" / "broken.png").write_bytes(whole[:-60])
    (root / "cat" / "fake.jpg").write_text("no image")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "emu" / "empty.png").parent.mkdir()
    (root / "emu" / "empty.png").write_bytes(b"")
    (root / "void").mkdir()
    data = load_images(root, SIZE)
    assert len(data) == 3 and data.classes == ("cat", "dog")
    assert [line.split(": ")[0] for line in data.skipped] == [
        "cat/notes.txt",
        "cat/broken.png",
        "cat/fake.jpg",
        "emu/empty.png",
        "emu",
        "void",
    ]
    assert "by its name" in data.skipped[0]
    assert "truncated" in data.skipped[1]
    assert data.skipped[2] == "cat/fake.jpg: not an image that can be read"
    assert data.skipped[4] == "emu: no readable image, so it is not a class"
    assert equal(load_images(root, SIZE), data)
    assert equal(load_images(zip_of(root, tmp_path / "s.zip"), SIZE), data)


@pytest.mark.parametrize("side", [9, 12], ids=["pillow-warns", "pillow-refuses"])
def test_decompression_bombs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Any) -> None:
    root = two_classes(tmp_path / "set")
    save(root / "cat" / "bomb.png", pixels(0, side, side))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE**2)  # Pillow warns beyond it and refuses twice as much
    data = load_images(root, SIZE)
    assert len(data) == 3
    assert len(data.skipped) == 1 and data.skipped[0].startswith("cat/bomb.png: Image size (")


def test_too_large_files_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "set")
    save(root / "cat" / "vast.png", pixels(0, 32, 32))
    monkeypatch.setattr(sources, "_MAX_FILE_BYTES", 1000)
    data = load_images(root, SIZE)
    assert len(data) == 3 and "more than the 1000" in data.skipped[0]
    assert equal(load_images(zip_of(root, tmp_path / "s.zip"), SIZE), data)


def test_nothing_left_is_an_error_that_names_the_first_files(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    for index in range(5):
        (tmp_path / "set" / "cat" / f"{index}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no readable image in .*set\. Skipped 5, first: cat/0\.png: .*cat/2\.png: "):
        load_images(tmp_path / "set", SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no readable image in .*empty\. Expected"):
        load_images(tmp_path / "empty", SIZE)
    assert not list((tmp_path / "cache").iterdir())  # not even a temporary file


# Decoding


def one(tmp_path: Path, array: np.ndarray, size: int, **options: object) -> np.ndarray:
    save(tmp_path / "one" / "image.png", array, **options)
    return load_images(tmp_path / "one", size).images[0]


@pytest.mark.parametrize(("height", "width"), [(31, 20), (20, 31), (9, 12)], ids=["tall", "wide", "enlarged"])
def test_centre_crop_and_lanczos(tmp_path: Path, height: Any, width: Any) -> None:
    array = pixels(0, height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(np.ascontiguousarray(array[top : top + side, left : left + side]))
    expected = np.asarray(crop.resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(one(tmp_path, array, 16), chw(expected))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    array = pixels(0)
    assert np.array_equal(one(tmp_path, array, SIZE, exif=exif), chw(np.rot90(array, -1)))


def test_integers_of_32_bits_are_eight_or_sixteen_bits_or_skipped(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.int32).reshape(8, 8) * 1040
    save(tmp_path / "set" / "a.tif", grey)
    save(tmp_path / "set" / "b.tif", grey * 2)
    save(tmp_path / "set" / "c.tif", grey.astype(np.float32))
    save(tmp_path / "set" / "d.tif", grey // 260)
    (tmp_path / "set" / "e.tif").write_bytes(tiff(grey.astype("<i2"), (339, 2)))
    data = load_images(tmp_path / "set", SIZE)
    assert np.array_equal(data.images[0, 0], np.rint(grey / 257).astype(np.uint8))
    assert np.array_equal(data.images[1, 0], grey // 260)
    assert data.skipped == (
        "b.tif: integer pixels from 0 to 131040, whose range is not known: save it with 8 or 16 bits",
        "c.tif: floating-point pixels have no known range",
        "e.tif: integer pixels from -32256 to 32240, whose range is not known: save it with 8 or 16 bits",
    )


def tiff(samples: np.ndarray, *changes: tuple[int, int], depth: int = 16) -> bytes:
    """Grey of 8x8 pixels, uncompressed; `changes` are tags and their values."""
    tags = {256: 8, 257: 8, 258: depth, 259: 1, 262: 1, 273: 8, 277: 1, 279: samples.nbytes, 339: 1} | dict(changes)
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in sorted(tags.items()))
    return (
        b"II*\0" + struct.pack("<I", 8 + samples.nbytes) + samples.tobytes() + struct.pack("<H", len(tags)) + directory
    )


def test_the_scale_of_grey_is_that_of_the_declared_depth(tmp_path: Path) -> None:
    """16 bits with white at zero, and 12 bits, two samples in three bytes."""
    levels = np.arange(64).reshape(8, 8)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tif").write_bytes(tiff((levels * 1040).astype("<u2"), (262, 0)))
    twelve = (levels * 65).reshape(-1, 2)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1)
    (tmp_path / "set" / "b.tif").write_bytes(tiff(packed.astype(np.uint8), depth=12))
    first, second = load_images(tmp_path / "set", SIZE).images[:, 0]
    assert np.array_equal(first, np.rint((65535 - levels * 1040) / 257))
    assert np.array_equal(second, np.rint(levels * 65 / 4095 * 255))


@pytest.mark.parametrize(
    ("depth", "colour_type", "samples", "key", "expected"),
    [
        (2, 0, np.array([0b00011011], np.uint8), (1,), [0, 255, 170, 255]),
        (16, 0, np.array([514, 1799, 1800, 65535], ">u2"), (1799,), [2, 255, 7, 255]),
        (16, 2, np.array([7, 7, 7, 1799, 1799, 1799, 1800, 1800, 1800, 257, 0, 0], ">u2"), (1799,) * 3, [0, 255, 7, 1]),
    ],
    ids=["2-bit", "16-bit", "16-bit colour"],
)
def test_a_transparent_colour_of_a_png_is_laid_over_white(
    tmp_path: Path, depth: Any, colour_type: Any, samples: Any, key: Any, expected: Any
) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 4, 4, depth, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    chunks += chunk(b"IDAT", zlib.compress((b"\0" + samples.tobytes()) * 4)) + chunk(b"IEND", b"")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert load_images(tmp_path / "one", 4).images[0, 0].tolist() == [expected] * 4


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.dstack([pixels(0), np.full((SIZE, SIZE), 255, np.uint8)])
    rgba[0, 0] = (10, 20, 30, 0)
    rgba[0, 1] = (0, 100, 255, 51)  # a fifth
    result = one(tmp_path, rgba, SIZE)
    assert result[:, 0, 0].tolist() == [255, 255, 255]
    assert result[:, 0, 1].tolist() == [204, 224, 255]
    assert np.array_equal(result[:, 1:], chw(rgba[1:, :, :3]))


def test_transparent_palette_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (SIZE, SIZE // 2)), "L")
    image.putpalette([10, 20, 30, 40, 50, 60])
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one" / "image.png", transparency=0)
    result = load_images(tmp_path / "one", SIZE).images[0]
    assert result[:, 0, 0].tolist() == [255, 255, 255] and result[:, 0, 1].tolist() == [40, 50, 60]


def test_progress_counts_every_file_once(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    (root / "cat" / "fake.png").write_bytes(b"x")
    seen: list[tuple[int, int]] = []
    load_images(root, SIZE, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    load_images(root, SIZE, progress=lambda *_: pytest.fail("decoded again"))


# Cache


@pytest.mark.parametrize("kind", ["folder", "zip", "cifar"])
def test_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    source = two_classes(tmp_path / "set")
    if kind == "zip":
        source = zip_of(source, tmp_path / "s.zip")
    elif kind == "cifar":
        source = cifar_archive(tmp_path / "c.tar.gz", cifar_files()[0], "b")
    first = load_images(source, SIZE)
    forbid_decoding(monkeypatch)
    assert equal(load_images(source, SIZE), first)


@pytest.mark.parametrize("change", ["content", "added", "removed", "size"])
def test_any_change_misses_the_cache(tmp_path: Path, change: Any) -> None:
    root = two_classes(tmp_path / "set")
    first = load_images(root, SIZE)
    size = SIZE
    if change == "content":
        file = root / "cat" / "a.png"
        before = file.stat()
        save(file, pixels(7))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "added":
        save(root / "cat" / "c.png", pixels(7))
    elif change == "removed":
        (root / "cat" / "a.png").unlink()
    else:
        size = 4
    second = load_images(root, size)
    assert second.fingerprint != first.fingerprint
    if change == "content":
        assert np.array_equal(second.images[0], chw(pixels(7)))
    assert len(second) == {"added": 4, "removed": 2}.get(change, 3)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("memory", [10**9, 0], ids=["in-memory", "mapped"])
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".npy", flip_last_byte),
        (".npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (".npy", lambda path: path.write_bytes(b"")),
        (".npy", lambda path: path.unlink()),
        (".npy", lambda path: np.save(path, np.zeros((3, 3, SIZE, SIZE), np.uint8))),
        (".json", lambda path: path.write_text("{")),
        (".json", lambda path: path.write_text("{}")),
        (".json", lambda path: path.write_text(path.read_text().replace('"labels": [0, 0', '"labels": [0, 1'))),
    ],
    ids=["byte", "truncated", "empty", "gone", "zeros", "half-json", "other-json", "labels"],
)
def test_damaged_cache_is_decoded_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: Any, damage: Any, memory: Any
) -> None:
    root = two_classes(tmp_path / "set")
    first = load_images(root, SIZE)
    (file,) = (tmp_path / "cache").glob(f"*{suffix}")
    damage(file)
    assert equal(load_images(root, SIZE, max_memory_bytes=memory), first)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert equal(load_images(root, SIZE), first)  # and it has been repaired
    assert not caplog.text


@pytest.mark.parametrize("skip_one", [False, True], ids=["all", "one-skipped"])
def test_large_sets_stay_mapped_and_are_equal(tmp_path: Path, skip_one: Any) -> None:
    root = two_classes(tmp_path / "set")
    if skip_one:
        (root / "cat" / "aa.png").write_bytes(b"x")
    mapped = load_images(root, SIZE, max_memory_bytes=3 * 3 * SIZE**2 - 1)
    loaded = load_images(root, SIZE, max_memory_bytes=3 * 3 * SIZE**2)
    assert isinstance(mapped.images, np.memmap) and not mapped.images.flags.writeable
    assert not isinstance(loaded.images, np.memmap)
    assert equal(mapped, loaded)
    (file,) = (tmp_path / "cache").glob("*.npy")
    assert np.array_equal(np.load(file, allow_pickle=False), loaded.images)
    for data in (mapped, loaded):
        images, labels = data.batch(np.array([2, 0]))
        images += 1  # a copy: neither the file nor the set changes
        assert torch.equal(images - 1, torch.from_numpy(np.stack([chw(pixels(3)), chw(pixels(1))])))
        assert labels.tolist() == [1, 0] and labels.dtype == torch.int64
        assert np.array_equal(data.images[0], chw(pixels(1)))


def test_unwritable_cache_falls_back_on_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = two_classes(tmp_path / "set")
    (tmp_path / "file").write_text("not a folder")
    expected = load_images(root, SIZE)
    assert equal(load_images(root, SIZE, cache_dir=tmp_path / "file"), expected)
    assert "cannot be kept" in caplog.text
    with pytest.raises(ValueError, match=r"needs 576 bytes, more than the 10 allowed.*ATTNORM_CACHE"):
        load_images(root, SIZE, cache_dir=tmp_path / "file", max_memory_bytes=10)


def test_what_is_kept_of_images_is_for_their_owner_alone(tmp_path: Path) -> None:
    load_images(zip_of(two_classes(tmp_path / "set"), tmp_path / "s.zip"), SIZE)
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "cache").iterdir()] == [0o600, 0o600]


def test_full_disk_falls_back_on_memory_and_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "set")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    data = load_images(root, SIZE)
    assert np.array_equal(data.images[2], chw(pixels(3)))
    assert not list((tmp_path / "cache").iterdir())


def test_two_writers_at_once_do_not_break_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "set")
    together = threading.Barrier(2, timeout=120)
    decode_all = cache._decode_all

    def decode_together(*arguments: Any) -> Any:
        together.wait()  # neither has seen the other's cache
        return decode_all(*arguments)

    monkeypatch.setattr(cache, "_decode_all", decode_together)
    results: list[ImageSet] = []
    threads = [threading.Thread(target=lambda: results.append(load_images(root, SIZE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forbid_decoding(monkeypatch)
    assert len(results) == 2
    assert equal(*results) and equal(load_images(root, SIZE), results[0])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "set")
    folder = tmp_path / "cache"

    def die(*_: object) -> None:
        (file,) = folder.iterdir()
        os.link(file, folder / f"{file.stem}old.tmp")  # being killed leaves the file; an exception does not
        os.link(file, folder / f"{file.stem}young.tmp")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "_decode_all", die)
        load_images(root, SIZE)
    old, young = sorted(folder.iterdir())
    foreign = folder / "mine.tmp"
    for file, hours in ((old, 25), (young, 23), (foreign, 25)):
        file.unlink(missing_ok=True)  # the two are one file by now, of one age
        file.write_bytes(b"half")
        os.utime(file, (time.time() - hours * 3600,) * 2)
    load_images(root, SIZE)
    assert set(folder.glob("*.tmp")) == {young, foreign}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ATTNORM_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/attnorm"),
        ({}, "/home/me/.cache/attnorm"),
    ],
    ids=["own", "xdg", "home"],
)
def test_cache_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, variables: Any, expected: Any) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("ATTNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.default_cache_dir() == Path(expected)


# Conversion


def test_conversion_round_trip_is_exact() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert floats[0] == -1 and floats[255] == 1
    torch.testing.assert_close(floats, torch.linspace(-1, 1, 256))
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(floats.double()), levels)


def test_to_uint8_rounds_to_nearest_and_clamps() -> None:
    levels = torch.tensor([99.6, 100.4, -3.0, 300.0])
    assert to_uint8(levels / 127.5 - 1).tolist() == [100, 100, 0, 255]
    assert to_uint8(torch.tensor([torch.inf, -torch.inf])).tolist() == [255, 0]


def test_conversions_refuse_the_other_side() -> None:
    with pytest.raises(ValueError, match=r"torch\.float32 pixels, expected torch\.uint8"):
        to_float(torch.zeros(1))
    with pytest.raises(ValueError, match=r"torch\.uint8 pixels, expected floats"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


# Order


def test_every_epoch_is_another_permutation() -> None:
    epochs = shuffled_indices(50, 0, 200, seed=1).reshape(4, 50)
    assert epochs.dtype == np.int64
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs[0], np.arange(50))


@pytest.mark.parametrize("batch", [1, 7, 64, 130])
def test_stream_does_not_depend_on_how_it_is_cut(batch: Any) -> None:
    whole = shuffled_indices(30, 0, 400, seed=3)
    pieces = [shuffled_indices(30, start, min(batch, 400 - start), seed=3) for start in range(0, 400, batch)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(shuffled_indices(30, 317, 41, seed=3), whole[317:358])
    assert shuffled_indices(30, 5, 0, seed=3).size == 0


def test_stream_depends_on_the_seed_alone() -> None:
    a, b = shuffled_indices(50, 0, 50, seed=1), shuffled_indices(50, 0, 50, seed=2)
    assert not np.array_equal(a, b)
    a[:] = 0  # what callers do to a result must not reach the next one
    np.random.seed(0)
    module._permutation.cache_clear()
    fresh = shuffled_indices(50, 0, 50, seed=1)
    fresh_again = shuffled_indices(50, 0, 50, seed=1)
    assert fresh.any() and np.array_equal(fresh, fresh_again)


def test_stream_is_the_same_on_every_machine() -> None:
    # The raw numbers of PCG64 never change, so neither may this; a run must resume elsewhere in the same order.
    assert shuffled_indices(8, 6, 6, seed=0).tolist() == [4, 5, 7, 4, 5, 1]


def test_stream_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="num_images=0"):
        shuffled_indices(0, 0, 1, seed=0)
    with pytest.raises(ValueError, match="seed=-1"):
        shuffled_indices(5, 0, 1, seed=-1)


# Squares, and what is held out


def test_squares_are_cut_where_they_are_asked_for() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 7, 9), np.uint8))
    tops, lefts = torch.tensor([0, 2, 3]), torch.tensor([5, 0, 2])
    squares = cut_squares(images, tops, lefts, 4)
    for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        assert torch.equal(squares[i], images[i, :, top : top + 4, left : left + 4])
    assert torch.equal(cut_centres(images, 5), images[:, :, 1:6, 2:7])


@pytest.mark.parametrize(
    ("num_images", "every", "expected"), [(25, 10, [9, 19]), (4, 2, [1, 3]), (9, 10, []), (9, 0, [])]
)
def test_every_so_manieth_image_is_held_out(num_images: Any, every: Any, expected: Any) -> None:
    assert held_out_indices(num_images, every).tolist() == expected


# Paris StreetView


def street(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture with detail at every scale, so that neither a shift nor another filter goes unseen."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height // 9, width // 9, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def area_reduced(image: np.ndarray, size: int, left: float, side: int) -> np.ndarray:
    """[size, size, 3]: the mean over the part of the square that each pixel covers, from integrals up to its edges."""
    for axis, start in ((0, 0.0), (1, left)):
        edges = np.linspace(start, start + side, size + 1)
        integral = np.insert(np.cumsum(image, axis, dtype=float), 0, 0, axis)
        whole, part = edges.astype(int), edges % 1
        shape = [-1 if a == axis else 1 for a in range(3)]
        after = np.minimum(whole + 1, image.shape[axis])
        at_edges = integral.take(whole, axis) * (1 - part).reshape(shape) + integral.take(after, axis) * part.reshape(
            shape
        )
        image = np.diff(at_edges, axis=axis) * size / side
    return image


@pytest.mark.parametrize("size", [256, 64])
def test_street_view_squares_are_those_of_the_original_reduced_by_area(tmp_path: Path, size: Any) -> None:
    original = street(936, 537)
    save(tmp_path / "set" / "a.png", original)
    data = load_images(tmp_path / "set", size, fit="street-view")
    assert data.images.shape == (1, 3, size, {256: 446, 64: 110}[size])
    assert "936x537" in data.note and "random 537 squares" in data.note
    centre = cut_centres(data.batch(np.array([0]))[0], size)[0].permute(1, 2, 0).numpy()
    assert np.abs(centre - area_reduced(original, size, (936 - 537) / 2, 537)).max() <= 0.51  # rounded
    assert np.abs(centre - area_reduced(original, size, 199, 537)).max() > 2
    # A square at another place is a 537 square too: eight pixels to the left are 8 * 537 / size there.
    left = (data.images.shape[3] - size) // 2 - 8
    square = data.images[0, :, :, left : left + size].transpose(1, 2, 0)
    assert np.abs(square - area_reduced(original, size, (936 - 537) / 2 - 8 * 537 / size, 537)).max() <= 0.51


def test_the_small_street_view_is_told_apart_and_labelled(tmp_path: Path) -> None:
    original = street(227, 227)
    save(tmp_path / "set" / "a.png", original)
    data = load_images(tmp_path / "set", 256, fit="street-view")
    expected = np.asarray(Image.fromarray(original).resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(data.images[0], chw(expected))
    assert "227x227" in data.note and "not comparable" in data.note


def test_street_view_files_of_another_size_are_skipped_and_other_sets_refused(tmp_path: Path) -> None:
    save(tmp_path / "set" / "b.png", street(936, 537))
    save(tmp_path / "set" / "c.png", street(227, 227))
    (tmp_path / "set" / "a.png").write_bytes(b"broken")
    data = load_images(tmp_path / "set", 64, fit="street-view")
    assert len(data) == 1
    assert data.skipped[0].startswith("a.png") and data.skipped[1].startswith("c.png: 227x227 pixels, unlike")
    save(tmp_path / "other" / "a.png", pixels(1))
    with pytest.raises(
        ValueError, match="is not Paris StreetView: its first image is 8x8; expected 936x537 or 227x227"
    ):
        load_images(tmp_path / "other", 64, fit="street-view")
    with pytest.raises(ValueError, match="built-in photographs are not Paris StreetView"):
        load_images("builtin", 64, fit="street-view")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable image"):
        load_images(tmp_path / "none", 64, fit="street-view")


def test_street_view_is_cached_apart_and_may_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        save(tmp_path / "set" / f"{seed}.png", street(936, 537, seed))
    square = load_images(tmp_path / "set", 64)
    first = load_images(tmp_path / "set", 64, fit="street-view")
    forbid_decoding(monkeypatch)
    again = load_images(tmp_path / "set", 64, fit="street-view", max_memory_bytes=10)
    assert isinstance(again.images, np.memmap) and equal(first, again) and again.note == first.note
    assert square.images.shape == (3, 3, 64, 64) and equal(load_images(tmp_path / "set", 64), square)
    seen, _ = again.batch(np.array([2, 0]))
    assert np.array_equal(seen.numpy(), first.images[[2, 0]])


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("train", "val"), "train and val: splits of a data set, not classes"),
        (("Train", "TEST"), "TEST and Train: splits of a data set, not classes"),
        (("train", "val", "annotations"), "train and val: splits"),
        (("training_set", "test_set"), "test_set and training_set: splits"),
        (("seg_train", "seg_test"), "seg_test and seg_train: splits"),
        (("train2017", "val2017"), "train2017 and val2017: splits"),
        (("train",), "train: a split of a data set, not a class"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_splits_are_not_taken_for_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, ...], said: str, as_zip: bool
) -> None:
    root = tmp_path / "set"
    for name in folders:
        save(root / name / "cat" / "a.png", pixels(1))
    train = min(folders, key=lambda name: "train" not in name.casefold())
    source = zip_of(root, tmp_path / "set.zip", "" if len(folders) > 1 else "set/") if as_zip else root
    meant = root / "set" / train if as_zip and len(folders) == 1 else root / train
    forbid_decoding(monkeypatch)
    with pytest.raises(ValueError, match=f"set.* holds {said}.*; say which .*use --data {meant}$"):
        load_images(source, SIZE)


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        save(tmp_path / "vehicles" / name / "a.png", pixels(1))
    assert load_images(tmp_path / "vehicles", SIZE).classes == ("bus", "train")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    os.mkfifo(root / "dog" / "pipe.png")
    assert load_images(root, SIZE).skipped == ("dog/pipe.png: it is not a regular file",)
    for source in (root / "dog" / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="neither a folder nor a regular file"):
            load_images(source, SIZE)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_what_could_not_be_read_for_a_while_is_read_when_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Any
) -> None:
    root = two_classes(tmp_path / "set")
    read = sources.read_regular

    def fail(path: Path) -> bytes:
        if path.parent.name == "dog":
            raise OSError(code, os.strerror(code))
        return read(path)

    monkeypatch.setattr(sources, "read_regular", fail)
    first = load_images(root, SIZE)
    assert first.classes == ("cat",) and first.skipped[0] == f"dog/x.png: {os.strerror(code)}"
    with monkeypatch.context() as context:
        forbid_decoding(context)  # while nothing has changed, the others need not be decoded again
        assert equal(load_images(root, SIZE), first)
    monkeypatch.setattr(sources, "read_regular", read)
    data = load_images(root, SIZE)
    assert data.classes == ("cat", "dog") and data.skipped == ()
    forbid_decoding(monkeypatch)
    assert equal(load_images(root, SIZE), data)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_classes(tmp_path / "set")
    scan = os.scandir

    def fail(path: str) -> object:
        if Path(path).name == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    closed = "dog"
    assert "dog/: Permission denied" in load_images(root, SIZE).skipped
    closed = "set"
    with pytest.raises(PermissionError):
        load_images(root, SIZE)
