"""LPIPS against its formula written out, and which files it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import alexnet

from attnorm.config import ConfigError, UserError
from attnorm.metrics.lpips import CHANNELS, Lpips, load_lpips


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random weights by the names of the published files, one of them as safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    own = {f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1) for i, channels in enumerate(CHANNELS)}
    save_file(own, folder / "alex.safetensors")
    torch.save(alexnet().state_dict(), folder / "alexnet.pth")
    return [folder / "alexnet.pth", folder / "alex.safetensors"]


def test_the_distance_is_that_of_its_formula(files: list[Path]) -> None:
    model = load_lpips(files, device="cpu")
    images = torch.randint(256, (2, 2, 3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = model(*images)
    network = alexnet()
    network.load_state_dict(torch.load(files[0], weights_only=True))
    shift, scale = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
    for n in range(2):
        x, y = (((image[n].float() / 127.5 - 1).movedim(0, 2) - shift) / scale for image in images)
        x, y = x.movedim(2, 0)[None], y.movedim(2, 0)[None]
        total, layer = 0.0, 0
        for module in network.features[:12]:
            x, y = module(x.clone()), module(y.clone())
            if isinstance(module, torch.nn.ReLU):
                u, v = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10) for h in (x, y))
                total += (model.weights[layer] * (u - v) ** 2).sum(1).mean().item()
                layer += 1
        assert layer == 5 and found[n].item() == pytest.approx(total, rel=1e-4)
    assert model(images[0], images[0]).tolist() == [0, 0] and found.dtype == torch.float64
    assert "LPIPS 0.1, AlexNet, weights " in model.protocol


def test_other_files_are_refused_and_none_is_run(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names 1 files; expected two"):
        load_lpips(files[:1])
    with pytest.raises(UserError, match="are not AlexNet's weights and LPIPS's"):
        load_lpips([files[0], files[0]])
    bad = tmp_path / "bad.pth"
    torch.save({"weight": Path("x")}, bad)  # which would call pathlib when it is read
    with pytest.raises(UserError, match="cannot be read as weights without running what is in it"):
        load_lpips([files[1], bad])
    with pytest.raises(ValueError, match="expected \\[1, C, 1, 1\\]"):
        Lpips(alexnet().state_dict(), [torch.zeros(1, 3, 1, 1)])
