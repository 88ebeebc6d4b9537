"""The loss is EDM's, arms differ in the block alone, all are scored on the same noises, and the command resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnorm import cli
from attnorm.config import ConfigError
from attnorm.data.images import ImageSet
from attnorm.experiments import diffusion
from attnorm.experiments.pre_norm_attention import PreNormAttention
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.linear_attention import LinearAttention2d
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.reports.diffusion import write_report


@pytest.fixture(scope="module")
def data() -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 3, 32, 32), np.uint8)
    return ImageSet(images, np.zeros(60, np.int64), ("a",), "noise", "f" * 64)


def test_the_loss_is_edms_weighted_denoising_error() -> None:
    network = diffusion.UNet(8).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    images, noise = torch.randn(3, 3, 32, 32).double(), torch.randn(3, 3, 32, 32).double()
    sigma = torch.tensor([0.01, 0.3, 20.0]).double()
    found = diffusion.denoising_loss(network, images, noise, sigma)
    for n, s in enumerate(sigma):  # Eq. 7 and 8 of Karras et al. (2022), image by image
        x = (images + s * noise)[n : n + 1]
        total = s**2 + 0.5**2
        f = network(x / total**0.5, (s.log() / 4)[None])
        denoised = 0.5**2 / total * x + s * 0.5 / total**0.5 * f.float()
        weight = total / (s * 0.5) ** 2
        expected = weight * (denoised - images[n : n + 1]).square().mean()
        torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=0)  # F was rounded to float32


def test_without_an_answer_the_loss_is_about_one_at_every_level() -> None:
    images = 0.5 * torch.randn(64, 3, 8, 8)

    class Zero(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            return torch.zeros_like(x)

    for loss in diffusion.score(Zero(), images, 4, "float32"):
        assert loss == pytest.approx(1, abs=0.05)


def test_levels_are_quantiles_of_those_trained_on() -> None:
    drawn = (-1.2 + 1.2 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).exp()
    shares = [(drawn < level).float().mean().item() for level in diffusion.levels(4)]
    np.testing.assert_allclose(shares, [1 / 8, 3 / 8, 5 / 8, 7 / 8], atol=0.005)


def test_arms_of_a_seed_start_as_the_same_function_with_a_block_at_16_pixels() -> None:
    x, level = torch.randn(2, 3, 32, 32), torch.zeros(2)
    networks = {arm: diffusion.make_network(arm, 8, 3).eval() for arm in diffusion.ARMS}
    for network in networks.values():
        nn.init.ones_(network.last.weight)  # else every network answers 0
    expected = networks["none"](x, level)
    assert expected.abs().max() > 0.1
    kinds = {
        "linear_attention": LinearAttention2d,
        "self_attention": SelfAttention2d,
        "pre_norm_attention": PreNormAttention,
        "an_one": AttentiveNorm2d,
        "an": AttentiveNorm2d,
    }
    assert {"none", *kinds} == diffusion.ARMS.keys()
    for arm, kind in kinds.items():
        seen: list[torch.Size] = []
        for module in networks[arm].modules():
            if isinstance(module, kind):
                module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        torch.testing.assert_close(networks[arm](x, level), expected)
        assert seen == [torch.Size([2, 16, 16, 16])] * 2
    other = diffusion.make_network("none", 8, 4)
    assert not torch.equal(other.first.weight, networks["none"].first.weight)


def test_the_command_trains_what_is_missing_and_reports(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnorm.cli.experiments.read_images", lambda *args, **kwargs: data)
    monkeypatch.setattr("attnorm.system.devices.cpu_info", list)
    command = ["experiment", "diffusion", "--data", "noise", "--out", str(tmp_path), "--scale", "smoke"]
    cli.main(command)
    trainings = tmp_path / "trainings.jsonl"
    kept = {(row["arm"], row["seed"]): row for row in map(json.loads, trainings.read_text().splitlines())}
    assert len(kept) == 2 * len(diffusion.ARMS)
    before = kept.pop(("an", 1))
    trainings.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    # Begun on a processor without units for bfloat16, gone on with on one that has them: in float32.
    protocol = json.loads((tmp_path / "experiment.json").read_text())["protocol"]
    assert protocol["precision"] == "float32"
    monkeypatch.setattr("attnorm.system.devices.cpu_info", lambda: ["flags: amx_bf16"])
    cli.main(command)
    *others, again = map(json.loads, trainings.read_text().splitlines())
    assert again["curve"] == before["curve"] and again["sites"] == before["sites"]
    assert others == list(kept.values())
    with pytest.raises(ConfigError, match="results of another data; choose"):
        diffusion.run(tmp_path, replace(data, fingerprint="0" * 64), write_report, scale="smoke")
    report = json.loads((tmp_path / "report.json").read_text())
    kept["an", 1] = again
    scores = {arm: [kept[arm, seed]["score"] for seed in (0, 1)] for arm in ("an", "none")}
    difference = np.subtract(scores["none"], scores["an"])
    row = next(row for row in report["arms"] if row["arm"] == "an")
    of_seeds = [np.mean([site["entropy"] for site in kept["an", seed]["sites"]]) for seed in (0, 1)]
    assert row["entropy"]["num"] == 2 and row["entropy"]["mean"] == pytest.approx(np.mean(of_seeds))
    assert row["entropy"]["half"] == pytest.approx(12.7062 * np.std(of_seeds, ddof=1) / 2**0.5, rel=1e-4)
    row = next(row for row in report["arms"] if row["arm"] == "none")
    assert row["score"]["mean"] == pytest.approx(np.mean(scores["none"]))
    assert row["minus_an"]["mean"] == pytest.approx(difference.mean())
    assert row["minus_an"]["half"] == pytest.approx(12.7062 * difference.std(ddof=1) / 2**0.5, rel=1e-4)
    lines = (tmp_path / "report.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| none |")]
    assert line.startswith(f"| none | 2 | {row['score']['mean']:.5f} ± ")
