"""The studio's HTTP API, through a real client and a real server: what it gives, and what it refuses."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import gc
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from attnorm import pretrained
from attnorm.inference import Inpainter, Sampler
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.studio.jobs import Job, Jobs, TooBusy, TooLong
from attnorm.studio.service import Limits, Service
from tests.studio.conftest import CLASSES, make_run, serving

get, post = (functools.partial(method, timeout=60) for method in (httpx.get, httpx.post))  # on a busy machine


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def decoded(data: str | bytes) -> np.ndarray:
    """A picture's samples."""
    content = base64.b64decode(data) if isinstance(data, str) else data
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image)


def encoded(pixels: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def photograph(height: int = 48, width: int = 40) -> np.ndarray:
    """Smooth colours with some noise."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 30, (height, width, 3))
    return (np.stack([rows * 4, columns * 5, rows + columns], 2) + noise).clip(0, 255).astype(np.uint8)


def hole(height: int = 48, width: int = 40) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[12:30, 10:24] = True
    return mask


def fill(
    client: httpx.Client, method: str, image: bytes, mask: bytes, name: str = "a.png", **asked: Any
) -> httpx.Response:
    """What comes of a photograph and its mask."""
    files = {"image": (name, image), "mask": ("m.png", mask)}
    headers = {"accept": "application/json"} if asked.pop("json", False) else {}
    return client.post("/api/inpaint", params={"method": method, **asked}, files=files, headers=headers)


def said(answer: httpx.Response, status: int) -> str:
    """What an error says: JSON, short, without a traceback."""
    assert answer.status_code == status, answer.text
    message: str = answer.json()["error"]
    assert 0 < len(message) < 1000 and "Traceback" not in message
    return message


# Generators


def test_images_are_the_samplers_whatever_they_are_asked_for_with(client: httpx.Client, runs: Path) -> None:
    asked = {"model": "gan", "classes": ["tench", "0"], "seed": 5, "count": 2, "truncation": 0.3}
    made = client.post("/api/generate", json=asked).json()
    sampler = Sampler(runs / "gan", device="cpu")
    order = [(label, seed) for label in (2, 0) for seed in (5, 6)]
    assert [(image["class"], image["seed"]) for image in made["images"]] == [(CLASSES[i], seed) for i, seed in order]
    for image, (label, seed) in zip(made["images"], order, strict=True):
        expected = sampler.sample([seed], [label], truncation=0.3).images[0]
        np.testing.assert_array_equal(decoded(image["png"]), expected.permute(1, 2, 0).numpy())
    assert made["recipe"]["request"] | asked == made["recipe"]["request"]
    assert client.post("/api/generate", json=made["recipe"]["request"]).json()["images"] == made["images"]
    latents, whole = (
        sampler.latents([0, 1], truncation=0.3),
        client.post("/api/generate", json=asked | {"truncation": None}),
    )
    assert latents.abs().max() < 0.3 and whole.json()["images"] != made["images"]


def test_a_zip_and_a_grid_hold_the_same_images_and_the_recipe(client: httpx.Client) -> None:
    asked = {"model": "gan", "classes": ["tench", "café"], "count": 2}
    images = [decoded(image["png"]) for image in client.post("/api/generate", json=asked).json()["images"]]
    answer = client.post("/api/generate", json=asked | {"format": "zip"})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        recipe = json.loads(archive.read("recipe.json"))
        for entry, image in zip(recipe["images"], images, strict=True):
            np.testing.assert_array_equal(decoded(archive.read(entry["file"])), image)
    assert client.post("/api/generate", json=recipe["request"]).content == answer.content
    sheet = decoded(client.post("/api/generate", json=asked | {"format": "png"}).content)
    assert sheet.shape == (66, 66, 3)
    np.testing.assert_array_equal(sheet[34:, 34:], images[3])


def test_a_walk_is_the_samplers_and_its_ends_are_the_classes(client: httpx.Client, runs: Path) -> None:
    asked = {"model": "gan", "classes": ["tench", "café", "tench"], "seed": 3, "steps": 3}
    made = client.post("/api/interpolate", json=asked).json()
    sampler = Sampler(runs / "gan", device="cpu")
    expected = sampler.interpolate(3, [2, 1, 2], 3)
    layout = expected.layouts["blocks.2.an"].layout
    assert len(made["images"]) == len(made["maps"]) == 5
    for image, maps, pixels, shares in zip(made["images"], made["maps"], expected.images, layout, strict=True):
        difference = decoded(image).astype(int) - pixels.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1  # in other company, a grey level of rounding
        np.testing.assert_allclose(shares_of(maps), shares.numpy(), atol=0.51 / 255)
    ends = client.post("/api/generate", json={"model": "gan", "classes": ["tench"], "seed": 3, "count": 1}).json()
    assert abs(decoded(made["images"][0]).astype(int) - decoded(ends["images"][0]["png"])).max() <= 1


def test_a_walk_is_exported_as_animation_and_strip(client: httpx.Client) -> None:
    asked = {"model": "gan", "classes": ["0", "1"], "steps": 4}
    images = [decoded(image) for image in client.post("/api/interpolate", json=asked).json()["images"]]
    with Image.open(io.BytesIO(client.post("/api/interpolate", json=asked | {"format": "gif"}).content)) as animation:
        assert animation.n_frames == 6  # there and back
    strip = decoded(client.post("/api/interpolate", json=asked | {"format": "png"}).content)
    assert strip.shape == (32 + 2 + 32, 4 * 34 - 2, 3)
    np.testing.assert_array_equal(strip[:32, 34:66], images[1])
    plain = decoded(client.post("/api/interpolate", json=asked | {"format": "png", "model": "plain"}).content)
    assert plain.shape == (32, 4 * 34 - 2, 3)  # no layer, no maps


def shares_of(maps: dict[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(maps["shares"]), np.uint8) / 255
    return values.reshape(maps["entities"], maps["height"], maps["width"])


def test_the_layout_is_what_the_layer_saw_with_its_statistics(client: httpx.Client, runs: Path) -> None:
    made = client.post("/api/layout", json={"model": "gan", "class": "tench", "seed": 4}).json()
    images, layouts = Sampler(runs / "gan", device="cpu").sample([4], [2], with_layouts=True)
    (site,) = made["sites"]
    features, layout = (part[0] for part in layouts[site["name"]])
    np.testing.assert_array_equal(decoded(made["png"]), images[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(shares_of(site["maps"]), layout.numpy(), atol=0.51 / 255)
    won = layout.argmax(0) == 1
    region, facts = features[:, won], site["facts"]
    assert facts["regions"]["1"]["share"] == pytest.approx(won.float().mean().item())
    assert facts["regions"]["1"]["mean"] == pytest.approx(region.mean().item(), abs=1e-5)
    assert facts["regions"]["1"]["std"] == pytest.approx(region.std(1, correction=0).mean().item(), rel=1e-4)
    assert facts["whole"]["mean"] == pytest.approx(features.mean().item(), abs=1e-5)
    assert facts["rho"] == pytest.approx(0.8) and facts["is_awake"] and made["edited_png"] is None


def test_an_entity_that_is_off_wins_nothing_and_the_image_changes(client: httpx.Client) -> None:
    made = client.post("/api/layout", json={"model": "gan", "class": "0", "off": [1], "exchange": [0, 3]}).json()
    before, after = (shares_of(made[name][0]["maps"]) for name in ("sites", "edited_sites"))
    assert before[1].max() > 0.2 and after[1].max() == 0
    rest = before / before[[0, 2, 3]].sum(0)  # the softmax over the others
    np.testing.assert_allclose(after[[0, 2, 3]], rest[[3, 2, 0]], atol=2.5 / 255 / before[[0, 2, 3]].sum(0).min())
    assert (decoded(made["png"]) != decoded(made["edited_png"])).any()
    again = client.post("/api/layout", json={"model": "gan", "class": "0"}).json()
    assert again["sites"] == made["sites"] and again["png"] == made["png"]  # nothing of it stays


@pytest.mark.parametrize(
    ("path", "asked", "message"),
    [
        ("generate", {"model": "gna", "classes": ["0"]}, "there is no model 'gna'; there are: gan, inpainter"),
        ("generate", {"model": "inpainter", "classes": ["0"]}, "expected a class-conditional generator"),
        ("generate", {"model": "gan", "classes": ["0", "1"], "count": 33}, "expected 1 to 64"),
        ("generate", {"model": "gan", "classes": ["0"], "seed": -1}, "seed: Input should be greater than"),
        ("generate", {"model": "gan", "classes": ["0"], "cuont": 1}, "cuont: Extra inputs are not permitted"),
        ("interpolate", {"model": "gan", "classes": ["0"]}, "at least 2 items"),
        ("interpolate", {"model": "gan", "classes": ["0", "1", "0"], "steps": 62}, "at most 121 images"),
        ("layout", {"model": "plain", "class": "0"}, "no AttentiveNorm2d"),
        ("layout", {"model": "gan", "class": "0", "off": [4]}, "expected 0 to 3"),
        ("layout", {"model": "gan", "class": "0", "off": [0, 1, 2, 3]}, "all entities are off"),
        ("layout", {"model": "gan", "class": "0", "site": "x"}, "it has blocks.2.an"),
    ],
)
def test_a_mistake_is_told_in_words(client: httpx.Client, path: str, asked: dict[str, Any], message: str) -> None:
    answer = client.post(f"/api/{path}", json=asked)
    assert message in said(answer, 404 if "no model" in message else 422)


# Photographs


def test_a_filled_hole_is_the_inpainters_and_nothing_else_changes(client: httpx.Client, runs: Path) -> None:
    pixels, mask = photograph(), hole()
    answer = fill(client, "inpainter", encoded(pixels), encoded(mask))
    assert answer.headers["content-type"] == "image/png"
    filled = decoded(answer.content)
    np.testing.assert_array_equal(filled[~mask], pixels[~mask])
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = Inpainter(runs / "inpainter", device="cpu").fill(image, torch.from_numpy(mask)[None]).image
    np.testing.assert_array_equal(filled, expected.permute(1, 2, 0).numpy())
    by_hand = client.post(
        "/api/inpaint",
        params={"method": "inpainter", "hole": "10,12,14,18"},
        content=encoded(pixels),
        headers={"content-type": "image/png"},
    )
    inverted = fill(client, "inpainter", encoded(pixels), encoded(~mask), invert=True)
    assert by_hand.content == inverted.content == answer.content


def test_in_json_come_the_patch_the_layout_the_scores_and_the_recipe(client: httpx.Client, runs: Path) -> None:
    pixels, mask = photograph(), hole()
    made = fill(client, "inpainter", encoded(pixels), encoded(mask), layouts=True, scores=True, json=True).json()
    filled, patch = decoded(made["file"]), decoded(made["patch"])
    assert made["box"] == [12, 10, 30, 24] and patch.shape == (18, 14, 4) and (patch[..., 3] == 255).all()
    np.testing.assert_array_equal(patch[..., :3], filled[12:30, 10:24])
    (view,) = made["views"]
    inpainter = Inpainter(runs / "inpainter", device="cpu")
    seen = inpainter.fill(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(mask)[None], with_layouts=True)
    assert view["box"] == [0, 0, 48, 40] and seen.views[0].layout is not None
    np.testing.assert_allclose(shares_of(view["maps"]), seen.views[0].layout.numpy(), atol=0.51 / 255)
    apart = (filled[mask].astype(float) - pixels[mask]) / 255
    assert made["scores"]["mae_hole"] == pytest.approx(abs(apart).mean(), rel=1e-6)
    assert made["scores"]["psnr_hole"] == pytest.approx(-10 * np.log10((apart**2).mean()), rel=1e-6)
    assert made["recipe"]["checkpoint"] == "000000160.safetensors"
    asked = made["recipe"]["request"]
    assert len(asked["mask_sha256"]) == 64 and asked["seams"] is False


def test_the_file_keeps_its_format_and_what_it_says_of_itself(client: httpx.Client) -> None:
    pixels, mask = photograph(), hole()
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "someone"  # turned, and an artist
    data = encoded(pixels, "WEBP", lossless=True, exif=exif.tobytes(), icc_profile=b"x" * 200)
    shown = np.rot90(mask, -1)  # a mask is of the photograph as it is shown
    answer = fill(client, "mean", data, encoded(shown), "a.webp")
    assert answer.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == "WEBP" and image.info["icc_profile"] == b"x" * 200
        assert image.getexif()[0x013B] == "someone" and image.getexif()[0x0112] == 6
        np.testing.assert_array_equal(np.array(image)[~mask], pixels[~mask])
        assert (np.array(image)[mask] == pixels[~mask].mean(0).round()).all()
    assert fill(client, "mean", data, encoded(shown), "a.webp", format="TIFF").content[:2] == b"II"
    read = client.post("/api/photograph", files={"image": ("a.webp", data)}).json()
    assert (read["width"], read["height"], read["format"]) == (48, 40, "WEBP")
    np.testing.assert_array_equal(decoded(read["preview"]), np.rot90(pixels, -1))


def test_sixteen_bits_stay_sixteen_bits_outside_the_hole(client: httpx.Client) -> None:
    pixels, mask = photograph()[..., 0].astype(np.uint16) * 257 + 3, hole()
    for method in ("telea", "inpainter"):
        filled = decoded(fill(client, method, encoded(pixels), encoded(mask)).content)
        assert filled.dtype == np.uint16
        np.testing.assert_array_equal(filled[~mask], pixels[~mask])
        assert (filled[mask] != pixels[mask]).any()


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (b"GIF89a nonsense", encoded(hole()), "cannot read the image a.png"),
        (encoded(photograph()), b"no picture", "cannot read the mask"),
        (encoded(photograph()), encoded(hole(10, 10)), "the mask mask has 10x10 pixels, but a.png has 40x48"),
        (b"", encoded(hole()), "there is no image"),
        (encoded(photograph()), b"", "there is no mask"),
    ],
)
def test_a_photograph_that_cannot_be_filled_is_refused_in_words(
    client: httpx.Client, image: bytes, mask: bytes, message: str
) -> None:
    given = {"image": ("a.png", image), "mask": ("m.png", mask)}
    files = {name: file for name, file in given.items() if file[1]}
    assert message in said(client.post("/api/inpaint", params={"method": "mean"}, files=files), 422)


def test_an_examples_photograph_is_a_png_file_and_unknown_names_are_told(client: httpx.Client) -> None:
    assert decoded(client.get("/api/examples/cat").content).shape == (300, 451, 3)
    assert "astronaut" in said(client.get("/api/examples/dog"), 404)


# Limits


def bomb(side: int) -> bytes:
    """A PNG file of `side` x `side` pixels in a few hundred bytes, which says so in its header alone."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )


def test_pixels_are_counted_before_they_are_decoded(client: httpx.Client) -> None:
    for side in (8000, 60_000):  # the second is one that Pillow refuses by itself
        said(fill(client, "mean", bomb(side), encoded(hole())), 422)
    for side, is_counted in ((7000, False), (8000, True)):  # 49 million: a telephone's photograph is let in
        message = said(client.post("/api/photograph", files={"image": ("a.png", bomb(side))}), 422)
        assert ("8000x8000 pixels, more than the 50,000,000" in message) == is_counted
    assert "more than the" in said(fill(client, "mean", encoded(photograph()), bomb(8000)), 422)


def test_bytes_are_counted_by_what_is_said_and_by_what_comes(runs: Path) -> None:
    with (
        serving(Service([runs], limits=Limits(upload_bytes=20_000))) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        large = {"image": ("a.png", bytes(30_000))}
        assert "20,000 bytes" in said(client.post("/api/photograph", files=large), 413)
        parts = (bytes(1000) for _ in range(30))  # whose number is not said
        answer = client.post("/api/photograph", content=parts, headers={"content-type": "image/png"})
        assert "20,000 bytes" in said(answer, 413)
        assert "65,536 bytes" in said(client.post("/api/generate", content=b" " * 70_000), 413)
        assert client.get("/healthz").json()["status"] == "ok"


def endless(job: Job) -> None:
    while True:
        job.check()
        time.sleep(0.005)


def test_what_waits_is_bounded_what_runs_is_too_and_each_can_be_cancelled() -> None:
    jobs = Jobs(waiting=2, seconds=0.2)
    try:
        running = jobs.submit(endless, "running-job")
        while running.state == "waiting":
            time.sleep(0.001)
        first, second = jobs.submit(endless), jobs.submit(lambda job: 7)
        with pytest.raises(TooBusy, match="the queue is full, 2 waiting"):
            jobs.submit(endless)
        assert jobs.find(second.name) == (second, 2)
        first.cancel()  # makes room, and never begins
        assert jobs.find(second.name) == (second, 1)
        with pytest.raises(TooBusy, match="running-job is not finished"):
            jobs.submit(endless, "running-job")
        with pytest.raises(TooLong, match=r"0\.2 seconds"):
            running.result.result(10)
        assert second.result.result(10) == 7 and first.state != "running"
        failing = jobs.submit(lambda job: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failing.result.result(10)
        assert jobs.submit(lambda job: 8).result.result(10) == 8  # one's failure is its own
    finally:
        jobs.close()


class SlowService(Service):
    """Generation goes on until it is cancelled; what has ended is known."""

    def __init__(self, runs: Path, **limits: Any) -> None:
        super().__init__([runs], limits=Limits(**limits))
        self.begun, self.ended = threading.Semaphore(0), threading.Semaphore(0)

    def generate(self, *arguments: Any) -> Any:
        self.begun.release()
        try:
            endless(arguments[-1])
        finally:
            self.ended.release()


ASKED = {"model": "gan", "classes": ["0"], "count": 1}


def test_a_disconnect_and_a_cancel_end_the_work(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = SlowService(runs)
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        host, port = re.findall(r"//(.*):(\d+)", address)[0]
        body = json.dumps(ASKED).encode()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n")
            raw.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            assert service.begun.acquire(timeout=60)
        assert service.ended.acquire(timeout=60)  # nobody listens any more
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.post, "/api/generate", json=ASKED, headers={"x-job": "a-job-of-mine"})
            assert service.begun.acquire(timeout=60)
            with httpx.Client(base_url=address, timeout=60) as other:
                assert other.get("/api/jobs/a-job-of-mine").json()["state"] == "running"
                assert other.delete("/api/jobs/a-job-of-mine").status_code == 204
                assert service.ended.acquire(timeout=60)
                assert "cancelled" in said(waiting.result(10), 499)
                assert other.get("/api/jobs/a-job-of-mine").json()["state"] == "done"
    gc.collect()  # asyncio says of a future that is forgotten what nobody asked it for
    assert caplog.messages == []


def test_too_much_at_once_and_what_takes_too_long_are_refused_with_the_reason(runs: Path) -> None:
    with serving(SlowService(runs, waiting=0)) as address:
        answer = post(f"{address}/api/generate", json=ASKED)
        assert "the queue is full, 0 waiting" in said(answer, 503) and answer.headers["retry-after"] == "5"
    with serving(SlowService(runs, seconds=0.1)) as address:
        assert "0.1 seconds" in said(post(f"{address}/api/generate", json=ASKED), 504)


def test_eight_users_at_once_get_their_own_results_and_a_failing_one_harms_nobody(address: str, runs: Path) -> None:
    sampler = Sampler(runs / "gan", device="cpu")
    pixels, mask = photograph(), hole()

    def works(user: int) -> bool:
        with httpx.Client(base_url=address, timeout=60) as client:
            if user % 4 == 1:
                own = np.roll(pixels, user, 1)
                filled = decoded(fill(client, "inpainter", encoded(own), encoded(mask)).content)
                return np.array_equal(filled[~mask], own[~mask])
            if user % 4 == 3:
                with contextlib.suppress(httpx.TimeoutException):  # goes away before it is answered
                    client.post("/api/generate", json=ASKED | {"count": 64}, timeout=0.05)
                return fill(client, "mean", b"broken" * user, b"").status_code == 422
            asked = {"model": "gan", "classes": [str(user % 3)], "seed": user, "count": 1}
            (made,) = client.post("/api/generate", json=asked).json()["images"]
            expected = sampler.sample([user], [user % 3]).images[0].permute(1, 2, 0).numpy()
            return np.array_equal(decoded(made["png"]), expected)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(works, [*range(8), *range(8)]))
    assert get(f"{address}/healthz").json()["status"] == "ok"


# Safety


def test_a_host_that_is_not_ours_is_refused_and_this_machines_own_names_are_ours(client: httpx.Client) -> None:
    for host in ("evil.example:8420", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"):
        assert "none of this studio's" in said(client.get("/api/models", headers={"host": host}), 421)
    for host in ("localhost", "127.0.0.1:8420", "[::1]:1"):
        assert client.get("/healthz", headers={"host": host}).status_code == 200


def test_another_pages_requests_are_refused_and_the_pages_own_and_visits_answered(
    client: httpx.Client, address: str
) -> None:
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},  # another program on this machine
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ):
        assert "refused" in said(client.post("/api/generate", json=ASKED, headers=headers), 403)
        assert "refused" in said(client.get("/api/runs", headers=headers), 403)
    assert client.post("/api/generate", json=ASKED, headers={"origin": address}).status_code == 200
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=visit).status_code == 200


def test_with_a_token_nothing_is_given_without_it(runs: Path) -> None:
    with serving(Service([runs]), token="a-long-enough-token") as address:
        for path in ("/", "/api/models", "/healthz", "/static/studio.css", "/api/openapi.json"):
            assert "token" in said(get(address + path), 401)
        wrong = {"authorization": "Bearer a-long-enough-tokem"}
        assert "token" in said(get(f"{address}/healthz", headers=wrong), 401)
        right = {"authorization": "Bearer a-long-enough-token"}
        assert get(f"{address}/healthz", headers=right).status_code == 200
        with httpx.Client(base_url=address, timeout=60) as client:
            visit = client.get("/?token=a-long-enough-token")
            assert visit.status_code == 303 and visit.headers["location"] == "/"  # no longer in the address
            assert "HttpOnly" in visit.headers["set-cookie"] and "SameSite=Strict" in visit.headers["set-cookie"]
            assert client.get("/api/models").status_code == 200


def test_every_answer_says_that_nothing_else_may_be_loaded(client: httpx.Client) -> None:
    for path in ("/", "/api/docs", "/static/js/main.js", "/api/models", "/nothing"):
        headers = client.get(path).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"


def test_no_path_leads_out(client: httpx.Client) -> None:
    for path in (
        *("/static/../app.py", "/static/..%2fapp.py", "/static/js/..%2f..%2fapp.py"),
        *("/api/runs/..%2f..%2fetc/samples/1", "/api/runs/gan/samples/..%2f..%2fconfig.json"),
        *("/api/runs/gan/samples/81", "/api/runs/nothing/samples/80"),
    ):
        assert client.get(path).status_code in (404, 422), path


def test_links_out_of_a_run_directory_are_not_followed(runs: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", PRESETS["smoke"][1])
    (tmp_path / "secret").write_text('{"images_seen": 1, "secret": 1}\n')
    run = RunDirectory(tmp_path / "run")
    for file in (run.sample_file(80), run.metrics_file, run.checkpoint_file(160)):
        file.unlink()
        file.symlink_to(tmp_path / "secret")
    service = Service([tmp_path / "run"])
    with serving(service) as address:
        assert "link out of" in said(get(f"{address}/api/runs/run/samples/80"), 422)
        with httpx.stream("GET", f"{address}/api/runs/events", params={"run": "run"}) as stream:
            kinds = [line for _, line in zip(range(6), stream.iter_lines(), strict=False) if line]
        assert any("link out of" in line for line in kinds) and not any('secret":' in line for line in kinds)
        assert post(f"{address}/api/generate", json=ASKED | {"model": "run"}).status_code == 422


def test_names_are_text_and_what_would_steer_a_terminal_is_escaped(tmp_path: Path, runs: Path) -> None:
    (tmp_path / "<img src=x onerror=alert(1)>\x1b[2J").symlink_to(runs / "gan")
    with serving(Service([tmp_path])) as address:
        listed = get(f"{address}/api/models")
        assert listed.headers["content-type"] == "application/json"
        (model,) = (model for model in listed.json()["models"] if model["source"] == "run")
        assert model["classes"][0] == "<b>bold</b>" and model["id"] == "<img src=x onerror=alert(1)>\\x1b[2J"
        assert list(get(f"{address}/api/runs").json()) == [model["id"]]


# Runs


def test_a_run_is_watched_while_it_trains(tmp_path: Path) -> None:
    make_run(tmp_path / "run", PRESETS["smoke"][1])
    run = RunDirectory(tmp_path / "run")
    with serving(Service([tmp_path])) as address:
        assert get(f"{address}/api/runs").json()["run"]["checkpoint"] == 160
        with httpx.stream("GET", f"{address}/api/runs/events", params={"run": "run"}, timeout=20) as stream:
            events = read_events(stream)
            assert next(events) == ("status", {"run": "run", "preset": "smoke", "task": "class_conditional"}
                                    | {"duration_images": 160, "checkpoint": 160, "samples": [80]})  # fmt: skip
            first = {"images_seen": 80, "generator/loss": 1.5, "seconds": 0.5}
            assert next(events) == ("rows", {"run": "run", "anew": False, "rows": [first]})
            with run.metrics_file.open("a") as file:
                file.write('{"images_seen": 160, "generator/loss": 1.25, "x": NaN}\n{"images_se')  # still being written
            assert next(events)[1]["rows"] == [{"images_seen": 160, "generator/loss": 1.25}]
            run.sample_file(160).write_bytes(run.sample_file(80).read_bytes())
            assert next(events)[1]["samples"] == [80, 160]
            run.metrics_file.write_text('{"images_seen": 80, "generator/loss": 2.0}\n')  # resumed from an earlier place
            assert next(events) == (
                "rows", {"run": "run", "anew": True, "rows": [{"images_seen": 80, "generator/loss": 2.0}]}
            )  # fmt: skip
        assert get(f"{address}/api/runs/run/samples/160").content == run.sample_file(80).read_bytes()


def read_events(stream: httpx.Response) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def test_a_run_that_cannot_be_read_is_named_and_others_are_listed(tmp_path: Path, runs: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with serving(Service([tmp_path, runs / "gan"])) as address:
        listed = get(f"{address}/api/runs").json()
        assert "cannot be read" in listed["broken"]["problem"] and listed["gan"]["checkpoint"] == 160
        models = {model["id"]: model["problem"] for model in get(f"{address}/api/models").json()["models"]}
        assert "cannot be read" in models["broken"] and models["gan"] == ""


def test_a_newer_checkpoint_is_used_without_a_restart(tmp_path: Path) -> None:
    make_run(tmp_path / "run", PRESETS["smoke"][1])
    with serving(Service([tmp_path])) as address:
        before = post(f"{address}/api/generate", json=ASKED | {"model": "run"}).json()
        make_run(tmp_path / "run", PRESETS["smoke"][1], seed=1, images_seen=320)
        after = post(f"{address}/api/generate", json=ASKED | {"model": "run"}).json()
    assert (before["recipe"]["images_seen"], after["recipe"]["images_seen"]) == (160, 320)
    assert before["images"] != after["images"]


# The page and the documentation


def test_the_page_and_all_that_it_names_come_from_the_studio(client: httpx.Client) -> None:
    for page in ("/", "/api/docs"):
        text = client.get(page).text
        named = re.findall(r'(?:src|href)="([^"#]+)"', text)
        assert len(named) > 3
        for path in named:
            assert path.startswith("/") and client.get(path).status_code == 200, path
    assert not re.findall(r"https?://", client.get("/").text.replace("http://www.w3.org/2000/svg", ""))


def test_the_documentation_names_every_address(client: httpx.Client) -> None:
    paths = set(client.get("/api/openapi.json").json()["paths"])
    assert paths >= {f"/api/{name}" for name in ("models", "generate", "interpolate", "layout", "inpaint", "runs")}
    assert {"/healthz", "/api/runs/events", "/api/jobs/{name}"} <= paths


def test_the_examples_of_the_documentation_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "studio.md").read_text(encoding="utf-8")
    for name, run in {"first": "gan", "inpainter": "inpainter"}.items():
        (tmp_path / name).symlink_to(runs / run)
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(encoded(photograph()))
    Path("mask.png").write_bytes(encoded(hole()))
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(curl .*?)```", text, re.DOTALL)
    with serving(Service([tmp_path / "first", tmp_path / "inpainter"])) as address:
        names: dict[str, Any] = {}
        exec(program.replace("http://localhost:8420", address), names)
        names["studio"].close()
        assert decoded(Path("5.png").read_bytes()).shape == (32, 32, 3) and Path("walk.gif").is_file()
        listed, verdict, *_ = capsys.readouterr().out.splitlines()
        assert listed.startswith("['first'") and verdict.startswith("awake")
        if shutil.which("curl"):
            commands = commands.replace("http://localhost:8420", address)
            subprocess.run(["sh", "-ec", commands], check=True, timeout=60, capture_output=True)
            assert Path("by-curl.png").read_bytes() == Path("filled.png").read_bytes()


def test_models_of_the_package_stand_beside_runs(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("what", "data", "licence", "recipe", "machine", "commit", "score", "nearest")
    card = pretrained.Card(**dict.fromkeys(names, "x y"), images_seen=160, hours=1, scores=("z",), limits=("Small",))
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    pretrained.ship(runs / "gan" / "checkpoints" / "000000160.safetensors", "cats", card, tmp_path)
    with serving(Service([runs / "other"])) as address:
        run, shipped = get(f"{address}/api/models").json()["models"]
        assert (run["id"], run["source"], run["about"]) == ("other", "run", "")
        assert (shipped["id"], shipped["source"]) == ("cats", "shipped")
        assert shipped["about"] == "x y. Trained on x y. Small."
        assert shipped["classes"] == list(CLASSES) and shipped["entities"] == 4
        made = post(f"{address}/api/generate", json=ASKED | {"model": "cats"}).json()
        expected = Sampler(tmp_path / "cats.safetensors", device="cpu").sample([0], [0]).images[0]
        np.testing.assert_array_equal(decoded(made["images"][0]["png"]), expected.permute(1, 2, 0).numpy())
        assert list(get(f"{address}/api/runs").json()) == ["other"]
