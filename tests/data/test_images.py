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


def test_a_flat_folder_or_zip_is_one_class_named_after_it(tmp_path: Path) -> None:
    save(tmp_path / "pets" / "2.png", pixels(2))
    save(tmp_path / "pets" / "1.png", pixels(1))
    sources = {"pets": tmp_path / "pets", "birds": zip_of(tmp_path / "pets", tmp_path / "birds.zip")}
    sources["cats"] = zip_of(tmp_path / "pets", tmp_path / "all.zip", "cats/")
    for name, source in sources.items():
        data = load_images(source, SIZE)
        assert data.classes == (name,) and data.labels.tolist() == [0, 0]
        assert np.array_equal(data.images, np.stack([chw(pixels(1)), chw(pixels(2))]))


@pytest.mark.filterwarnings("ignore:Duplicate name")  # of the module that writes it
@pytest.mark.parametrize("spelling", ["{}", "imagery/{}", "./{}", "/{}", "set//{}", "set\\\\{}"])
def test_a_zip_gives_its_classes_however_its_names_are_spelled(tmp_path: Path, spelling: str) -> None:
    """And of a name that is there twice the last file, which is said."""
    root = two_classes(tmp_path / "set")
    files = [(file.relative_to(root).as_posix(), file) for file in filter(Path.is_file, root.rglob("*"))]
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, file in [("dog/x.png", root / "cat" / "a.png"), *files]:
            member = zipfile.ZipInfo()
            member.filename = spelling.format(name)
            if "\\" in spelling:
                member.filename = member.filename.replace("/", "\\")
            archive.writestr(member, file.read_bytes())
    data, expected = load_images(tmp_path / "s.zip", SIZE), load_images(root, SIZE)
    assert (data.fingerprint, data.classes) == (expected.fingerprint, ("cat", "dog"))
    (said,) = data.skipped
    assert said.endswith("dog/x.png: stands in the archive more than once; the last one is read")


def test_hidden_files_are_ignored_links_followed_and_loose_images_skipped(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    save(root / ".cache" / "x.png", pixels(9))
    save(root / "__MACOSX" / "x.png", pixels(9))
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    save(tmp_path / "elsewhere.png", pixels(4))
    (root / "dog" / "y.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "dog" / "z.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog" / "round").symlink_to(root)  # a circle
    save(root / "loose.png", pixels(9))
    data = load_images(root, SIZE)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(data.images[3], chw(pixels(4)))
    assert data.skipped == (
        "loose.png: lies beside the class folders, in none",
        "dog/z.png: No such file or directory",
    )


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
    source = cifar_archive(tmp_path / "cifar-10-binary.tar.gz", files, "cifar-10-batches-bin")
    if kind == "folder":
        source = tmp_path
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    data = load_images(source, 32)
    assert np.array_equal(data.images, images)
    assert [data.classes[label] for label in data.labels] == ["cat", "airplane", "truck", "cat"]
    assert data.skipped[0] == "automobile: no readable image, so it is not a class"
    if kind == "folder":  # names of their own
        (tmp_path / "batches.meta.txt").write_text("zero\none\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\n\n")
        data = load_images(tmp_path, 32)
        assert data.classes == ("nine", "three", "zero") and data.labels.tolist() == [1, 2, 0, 1]


def test_cifar10_that_is_damaged_or_pickled_is_refused(tmp_path: Path) -> None:
    files, _ = cifar_files()
    batch = tmp_path / "data_batch_1.bin"
    batch.write_bytes(files[batch.name][:-1])
    with pytest.raises(ValueError, match=r"data_batch_1\.bin .* has 6145 bytes, expected a multiple of 3073"):
        load_images(tmp_path, 32)
    batch.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match="label 10 but only 10 class names"):
        load_images(tmp_path, 32)
    twice = cifar_archive(tmp_path / "c.tar.gz", files | {f"again/{name}": data for name, data in files.items()}, "a")
    with pytest.raises(ValueError, match=r"c\.tar\.gz holds data_batch_\d\.bin twice; unpack it"):
        load_images(twice, SIZE)
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b"x"}, "cifar-10-batches-py")
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(b"x")
    for source in (archive, tmp_path / "py"):
        with pytest.raises(ValueError, match=r"pickles .* never read.*cifar-10-binary\.tar\.gz"):
            load_images(source, 32)


def test_wrong_sources_say_what_to_do(tmp_path: Path) -> None:
    two_classes(tmp_path / "photos")
    (tmp_path / "note.txt").write_text("hello")
    cifar_archive(tmp_path / "other.tar.gz", {"a.png": b""}, "images")
    for source, message in (
        (tmp_path / "photo", r"photo does not exist; did you mean photos\? expected 'builtin',"),
        ("bulitin", "did you mean builtin"),
        (tmp_path / "note.txt", "neither a folder nor an archive"),
        (tmp_path / "other.tar.gz", "Unpack any other and name its folder"),
        ("/dev/zero", "neither a folder nor a regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(source, SIZE)
    with pytest.raises(ValueError, match="image_size=0"):
        load_images(tmp_path / "photos", 0)


# Damage


def test_unreadable_files_are_named_and_not_fatal(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    whole = (root / "cat" / "a.png").read_bytes()
    (root / "emu").mkdir()
    (root / "void").mkdir()
    files = {"cat/broken.png": whole[:-60], "cat/fake.jpg": b"no image", "cat/notes.txt": b"text", "emu/empty.png": b""}
    for name, content in files.items():
        (root / name).write_bytes(content)
    data = load_images(root, SIZE)
    assert len(data) == 3 and data.classes == ("cat", "dog")
    notes, broken, fake, empty, *classes = data.skipped
    assert notes.startswith("cat/notes.txt: ") and "by its name" in notes
    assert broken.startswith("cat/broken.png: ") and "truncated" in broken
    assert fake == "cat/fake.jpg: not an image that can be read" and empty.startswith("emu/empty.png: ")
    assert classes == [f"{name}: no readable image, so it is not a class" for name in ("emu", "void")]
    assert equal(load_images(root, SIZE), data)
    assert equal(load_images(zip_of(root, tmp_path / "s.zip"), SIZE), data)


@pytest.mark.parametrize("side", [9, 12], ids=["pillow-warns", "pillow-refuses"])
def test_bombs_and_vast_files_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Any) -> None:
    root = two_classes(tmp_path / "set")
    save(root / "cat" / "bomb.png", pixels(0, side, side))
    save(root / "dog" / "vast.png", pixels(0, 32, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE**2)  # Pillow warns beyond it and refuses twice as much
    monkeypatch.setattr(sources, "_MAX_FILE_BYTES", 1000)
    data = load_images(root, SIZE)
    bomb, vast = data.skipped
    assert len(data) == 3 and bomb.startswith("cat/bomb.png: Image size (") and "more than the 1000" in vast
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
def test_centre_crop_and_lanczos_of_what_is_upright(tmp_path: Path, height: Any, width: Any) -> None:
    exif, array = Image.Exif(), pixels(0, height, width)
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(np.ascontiguousarray(array[top : top + side, left : left + side]))
    expected = np.asarray(crop.resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(one(tmp_path, np.rot90(array), 16, exif=exif), chw(expected))


def tiff(samples: np.ndarray, *changes: tuple[int, int], depth: int = 16) -> bytes:
    """Grey of 8x8 pixels, uncompressed; `changes` are tags and their values."""
    tags = {256: 8, 257: 8, 258: depth, 259: 1, 262: 1, 273: 8, 277: 1, 279: samples.nbytes, 339: 1} | dict(changes)
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in sorted(tags.items()))
    return (
        b"II*\0" + struct.pack("<I", 8 + samples.nbytes) + samples.tobytes() + struct.pack("<H", len(tags)) + directory
    )


def test_the_scale_of_deep_grey_is_that_of_the_declared_depth(tmp_path: Path) -> None:
    """Integers of 32 bits are eight bits, sixteen, or skipped; 16 bits with white at zero; 12 bits in three halves."""
    levels = np.arange(64, dtype=np.int32).reshape(8, 8)
    grey, root = 1040 * levels, tmp_path / "set"
    twelve = (levels * 65).reshape(-1, 2)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1)
    for name, samples in {"a": grey, "b": levels * 4, "c": 2 * grey, "d": grey.astype(np.float32)}.items():
        save(root / f"{name}.tif", samples)
    (root / "e.tif").write_bytes(tiff(grey.astype("<i2"), (339, 2)))
    (root / "f.tif").write_bytes(tiff(grey.astype("<u2"), (262, 0)))
    (root / "g.tif").write_bytes(tiff(packed.astype(np.uint8), depth=12))
    data = load_images(root, SIZE)
    expected = [np.rint(grey / 257), levels * 4, np.rint((65535 - grey) / 257), np.rint(levels * 65 / 4095 * 255)]
    assert np.array_equal(data.images[:, 0], np.stack(expected))
    assert data.skipped == (
        "c.tif: integer pixels from 0 to 131040, whose range is not known: save it with 8 or 16 bits",
        "d.tif: floating-point pixels have no known range",
        "e.tif: integer pixels from -32256 to 32240, whose range is not known: save it with 8 or 16 bits",
    )


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
    palette = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (SIZE, SIZE // 2)), "L")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    (tmp_path / "set").mkdir()
    palette.save(tmp_path / "set" / "1.png", transparency=0)
    save(tmp_path / "set" / "2.png", rgba)
    first, second = load_images(tmp_path / "set", SIZE).images
    assert first[:, 0, :2].T.tolist() == [[255, 255, 255], [40, 50, 60]]
    assert second[:, 0, :2].T.tolist() == [[255, 255, 255], [204, 224, 255]]
    assert np.array_equal(second[:, 1:], chw(rgba[1:, :, :3]))


# Cache


@pytest.mark.parametrize("kind", ["folder", "zip", "cifar"])
def test_a_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """The first one counts every file, and what it keeps is for its owner alone."""
    root, seen = two_classes(tmp_path / "set"), list[tuple[int, int]]()
    (root / "cat" / "fake.png").write_bytes(b"x")
    source = {
        "folder": lambda: root,
        "zip": lambda: zip_of(root, tmp_path / "s.zip"),
        "cifar": lambda: cifar_archive(tmp_path / "c.tar.gz", cifar_files()[0], "b"),
    }[kind]()
    first = load_images(source, SIZE, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "cache").iterdir()] == [0o600, 0o600]
    forbid_decoding(monkeypatch)
    assert equal(load_images(source, SIZE), first)


def test_any_change_misses_the_cache(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "set")
    file, seen = root / "cat" / "a.png", [load_images(root, SIZE)]
    before = file.stat()
    save(file, pixels(7))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    seen.append(load_images(root, SIZE))
    assert np.array_equal(seen[-1].images[0], chw(pixels(7)))
    save(root / "cat" / "c.png", pixels(8))
    seen.append(load_images(root, SIZE))
    file.unlink()
    seen += [load_images(root, SIZE), load_images(root, 4)]
    assert [len(data) for data in seen] == [3, 3, 4, 3, 3] and len({data.fingerprint for data in seen}) == 5


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
        (".npy", lambda path: path.unlink()),
        (".npy", lambda path: np.save(path, np.zeros((3, 3, SIZE, SIZE), np.uint8))),
        (".json", lambda path: path.write_text("{")),
        (".json", lambda path: path.write_text("{}")),
        (".json", lambda path: path.write_text(path.read_text().replace('"labels": [0, 0', '"labels": [0, 1'))),
    ],
    ids=["byte", "truncated", "gone", "zeros", "half-json", "other-json", "labels"],
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
    mapped, loaded = (load_images(root, SIZE, max_memory_bytes=3 * 3 * SIZE**2 - less) for less in (1, 0))
    assert isinstance(mapped.images, np.memmap) and not mapped.images.flags.writeable
    assert not isinstance(loaded.images, np.memmap) and equal(mapped, loaded)
    for data in (mapped, loaded):
        images, labels = data.batch(np.array([2, 0]))
        images += 1  # a copy: neither the file nor the set changes
        assert torch.equal(images - 1, torch.from_numpy(np.stack([chw(pixels(3)), chw(pixels(1))])))
        assert labels.tolist() == [1, 0] and labels.dtype == torch.int64
        assert np.array_equal(data.images[0], chw(pixels(1)))


def test_where_nothing_can_be_kept_images_are_decoded_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = two_classes(tmp_path / "set")
    (tmp_path / "file").write_text("not a folder")
    expected = load_images(root, SIZE)
    assert equal(load_images(root, SIZE, cache_dir=tmp_path / "file"), expected)
    assert "cannot be kept" in caplog.text
    with pytest.raises(ValueError, match=r"needs 576 bytes, more than the 10 allowed.*ATTNORM_CACHE"):
        load_images(root, SIZE, cache_dir=tmp_path / "file", max_memory_bytes=10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert equal(load_images(root, SIZE, cache_dir=tmp_path / "full"), expected)
    assert not list((tmp_path / "full").iterdir())


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


def test_cache_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "ATTNORM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    places = {"HOME": "/me/.cache/attnorm", "XDG_CACHE_HOME": "/x/attnorm", "ATTNORM_CACHE": "/a"}
    for (name, place), value in zip(places.items(), ("/me", "/x", "/a"), strict=True):  # each before those above it
        monkeypatch.setenv(name, value)
        assert cache.default_cache_dir() == Path(place)


# Conversion


def test_conversion_is_exact_there_and_back_rounds_to_nearest_and_clamps() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    torch.testing.assert_close(floats, torch.linspace(-1, 1, 256))
    assert floats[0] == -1 and floats[255] == 1
    assert torch.equal(to_uint8(floats), levels) and torch.equal(to_uint8(floats.double()), levels)
    assert to_uint8(torch.tensor([99.6, 100.4, -3.0, 300.0]) / 127.5 - 1).tolist() == [100, 100, 0, 255]
    assert to_uint8(torch.tensor([torch.inf, -torch.inf])).tolist() == [255, 0]
    with pytest.raises(ValueError, match=r"torch\.float32 pixels, expected torch\.uint8"):
        to_float(floats)
    with pytest.raises(ValueError, match=r"torch\.uint8 pixels, expected floats"):
        to_uint8(levels)


# Order


def test_every_epoch_is_another_permutation() -> None:
    epochs = shuffled_indices(50, 0, 200, seed=1).reshape(4, 50)
    assert epochs.dtype == np.int64
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(epochs[0], np.arange(50))


@pytest.mark.parametrize("batch", [7, 64])
def test_stream_does_not_depend_on_how_it_is_cut(batch: Any) -> None:
    whole = shuffled_indices(30, 0, 400, seed=3)
    pieces = [shuffled_indices(30, start, min(batch, 400 - start), seed=3) for start in range(0, 400, batch)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(shuffled_indices(30, 317, 41, seed=3), whole[317:358])
    assert shuffled_indices(30, 5, 0, seed=3).size == 0


def test_stream_is_the_same_on_every_machine() -> None:
    # The raw numbers of PCG64 never change, so neither may this; a run must resume elsewhere in the same order.
    for _ in range(2):
        np.random.seed(0)
        indices = shuffled_indices(8, 6, 6, seed=0)
        assert indices.tolist() == [4, 5, 7, 4, 5, 1]
        indices[:] = 0  # what callers do to a result must not reach the next one
    assert shuffled_indices(8, 6, 6, seed=1).tolist() != [4, 5, 7, 4, 5, 1]
    for num_images, seed in ((0, 0), (5, -1)):
        with pytest.raises(ValueError, match=f"num_images={num_images}, .*seed={seed}; expected"):
            shuffled_indices(num_images, 0, 1, seed=seed)


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
    small = street(227, 227)
    save(tmp_path / "small" / "a.png", small)
    data = load_images(tmp_path / "small", 256, fit="street-view")
    expected = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(data.images[0], chw(expected))
    assert "227x227" in data.note and "not comparable" in data.note


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
        (("train", "val", "annotations"), "train and val: splits"),
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
    with pytest.raises(ValueError, match="neither a folder nor a regular file"):
        load_images(root / "dog" / "pipe.png", SIZE)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE])
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
