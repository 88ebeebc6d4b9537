"""Run directories of small untrained networks, made in milliseconds."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

from attnorm.checkpoint import Header, save_checkpoint
from attnorm.config import Config
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.layers.observe import layers_of
from attnorm.models.class_conditional import Generator
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.studio.app import create_app
from attnorm.studio.service import Service

CLASSES = ("<b>bold</b>", "café", "tench")


def make_run(path: Path, config: Config, *, seed: int = 0, images_seen: int = 160) -> None:
    """A run that seems to have trained a little: the class shows, and AN is wide awake."""
    torch.manual_seed(seed)
    is_conditional = config.task == "class_conditional"
    classes = CLASSES if is_conditional else ()
    if is_conditional:
        config = replace(config, model=replace(config.model, num_classes=len(classes)))
    model = (Generator if is_conditional else InpaintingGenerator)(config.model)  # type: ignore[arg-type]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConditionalBatchNorm2d):
                module.gamma.weight.normal_(1, 0.5)
                module.beta.weight.normal_(0, 0.5)
        for layer in layers_of(model).values():
            layer.rho.fill_(0.8)
            layer.entities.weight.mul_(3)
            for affine in (layer.weight, layer.bias):
                if affine is not None:
                    affine.normal_()
    run = RunDirectory(path)
    run.create(config, {"source": "builtin", "classes": list(classes)})
    header = Header(config=config, classes=classes, images_seen=images_seen, seconds=1.0)
    tensors = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(run.checkpoint_file(images_seen), tensors, header)
    run.metrics_file.write_text('{"images_seen": 80, "generator/loss": 1.5, "seconds": 0.5}\n', encoding="utf-8")
    Image.new("RGB", (8, 8), "teal").save(run.sample_file(80))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs gan, other (another seed), plain (without AN) and inpainter."""
    folder = tmp_path_factory.mktemp("runs")
    gan = PRESETS["smoke"][1]
    make_run(folder / "gan", gan)
    make_run(folder / "other", gan, seed=1)
    make_run(folder / "plain", replace(gan, model=replace(gan.model, context="none")))
    make_run(folder / "inpainter", PRESETS["inpaint-smoke"][1])
    return folder


@contextlib.contextmanager
def serving(service: Service, **options: Any) -> Iterator[str]:
    """The address of a real server on a free port of the loopback address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(service, **options), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    ends = time.monotonic() + 60
    while not server.started and time.monotonic() < ends:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="session")
def address(runs: Path) -> Iterator[str]:
    with serving(Service([runs], device="cpu")) as address:
        yield address
