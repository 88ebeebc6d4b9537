"""Mixing and the discriminators on mixed maps, against their equations."""

import pytest
import torch
import torch.nn.functional as F

from attnorm.config import ProjectedConfig
from attnorm.models.feature_network import CHANNELS
from attnorm.models.projected import ProjectedDiscriminator, Projector

SMALL = ProjectedConfig(feature_size=32, width=4)


@pytest.fixture(scope="module")
def projector() -> Projector:
    torch.manual_seed(0)
    return Projector(SMALL)


def test_mixing_is_a_random_1x1_of_each_map_and_a_random_3x3_of_the_next_smaller(projector: Projector) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    maps = projector.features(images)
    filters = projector.state_dict()
    expected = []
    for scale in (3, 2, 1, 0):
        h = torch.einsum("oi,nihw->nohw", filters[f"mix_channels_{scale}"][:, :, 0, 0], maps[scale])
        if expected:
            deeper = F.conv2d(expected[-1], filters[f"mix_scales_{scale}"], padding=1)
            h = (h + F.interpolate(deeper, h.shape[2:], mode="bilinear")) / 2**0.5
        expected.append(h)
    got = projector(images)
    assert [tuple(h.shape[1:]) for h in got] == [(4, 8, 8), (8, 4, 4), (16, 2, 2), (32, 1, 1)]
    for h, wanted in zip(got, reversed(expected), strict=True):
        torch.testing.assert_close(h, wanted, rtol=1e-4, atol=1e-5)


def test_mixing_keeps_the_variance() -> None:
    torch.manual_seed(0)
    projector = Projector(ProjectedConfig(feature_size=32, width=16))
    projector.features.forward = lambda images: [
        torch.randn(8, channels, 16 >> scale, 16 >> scale) for scale, channels in enumerate(CHANNELS)
    ]
    for h in projector(torch.zeros(8, 3, 32, 32)):
        assert 0.7 < h.std().item() < 1.2  # enlarging takes a little


def test_images_are_enlarged_to_the_feature_size() -> None:
    larger, image = Projector(ProjectedConfig(feature_size=64, width=4)), torch.rand(1, 3, 32, 32)
    for h, wanted in zip(larger(image), larger(F.interpolate(image, (64, 64), mode="bilinear")), strict=True):
        torch.testing.assert_close(h, wanted)


def test_a_score_is_a_linear_map_plus_the_product_with_the_classs_row() -> None:
    torch.manual_seed(1)
    discriminator = ProjectedDiscriminator(SMALL, 3).eval()
    maps, labels = discriminator.projector(torch.rand(2, 3, 32, 32)), torch.tensor([2, 0])
    scores = discriminator(maps, labels)
    places = [4 * 4, 4 * 4, 2 * 2, 1]
    assert scores.shape == (2, sum(places))
    for head, h, part in zip(discriminator.heads, maps, scores.split(places, 1), strict=True):
        h = head.layers(h)
        weight = head.score.weight[0, :, 0, 0] + head.embedding.weight[labels]  # [N, C]
        wanted = torch.einsum("nc,nchw->nhw", weight, h) + head.score.bias
        torch.testing.assert_close(part, wanted.flatten(1), rtol=1e-4, atol=1e-5)


def test_every_weight_matrix_has_spectral_norm_one_after_power_iterations() -> None:
    torch.manual_seed(0)
    discriminator = ProjectedDiscriminator(SMALL, 3)
    maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (8, 4), (16, 2), (32, 1))]
    for _ in range(60):
        discriminator(maps, torch.tensor([1]))
    weights = [m.weight for m in discriminator.modules() if hasattr(m, "parametrizations")]
    assert len(weights) == 4 * 3 + 1  # the largest map is halved once
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)
