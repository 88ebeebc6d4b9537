"""Images from a checkpoint: each a function of its seed and class alone, and walks between classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnorm.checkpoint import CheckpointError, Header, save_checkpoint
from attnorm.config import Config
from attnorm.data.images import to_uint8
from attnorm.inference import Sampler
from attnorm.inference.sampler import truncated
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.settings import override
from attnorm.training.class_conditional import ClassConditionalTask

CLASSES = ("cat", "dog", "7", "goldfish")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator in which the class, the latent and the layer all show."""
    settings = ["image_size=32", "num_classes=4", "width=2", "latent_dim=5", "an.num_entities=3", "an.temperature=1"]
    config = override(Config(), [f"model.{setting}" for setting in settings])
    torch.manual_seed(0)
    task = ClassConditionalTask(config, torch.device("cpu"))
    for network in (task.generator, task.average.network):
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, ConditionalBatchNorm2d):
                    module.gamma.weight.normal_(1, 0.5)
                    module.beta.weight.normal_(0, 0.5)
            network.blocks[2].an.rho.fill_(0.7)
            network.to_rgb.bias.uniform_(-0.3, 0.3)
    path = tmp_path_factory.mktemp("inference") / "x.safetensors"
    save_checkpoint(path, task.state.tensors(), Header(config, CLASSES, 640, 1.0))
    return path


@pytest.fixture(scope="module")
def sampler(file: Path) -> Sampler:
    return Sampler(file, device="cpu", batch_size=4)


def grey_levels_apart(first: Tensor, second: Tensor) -> int:
    assert first.dtype == second.dtype == torch.uint8 and first.shape == second.shape
    return int((first.int() - second.int()).abs().max())


def test_latents_of_seeds_of_any_size_differ_and_those_of_32_bits_are_torchs(sampler: Sampler) -> None:
    seeds = [0, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**63 - 1, 2**64, (2**63 - 1) * 10_000_000]
    latents = sampler.latents(seeds)
    assert len({tuple(row.tolist()) for row in latents}) == len(seeds)
    assert torch.equal(latents[1], torch.randn(5, generator=torch.Generator().manual_seed(7)))
    many = sampler.latents(range(2**32, 2**32 + 4000))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    with pytest.raises(ValueError, match="got seed -1; expected 0 or more"):
        sampler.latents([-1])


def test_an_image_depends_on_its_seed_and_class_alone(sampler: Sampler) -> None:
    """Neighbours and batch size may change the order of sums, so up to one grey level."""
    seeds, labels = [5, 0, 123, 2**40, 7, 5], [0, 1, 2, 3, 0, 2]
    together = sampler.sample(seeds, labels).images
    for index, (seed, label) in enumerate(zip(seeds, labels, strict=True)):
        alone = sampler.sample([seed], [label]).images[0]
        assert grey_levels_apart(together[index], alone) <= 1
    backwards = sampler.sample(seeds[::-1], labels[::-1]).images.flip(0)
    assert grey_levels_apart(together, backwards) <= 1


def test_images_are_those_of_the_averaged_model(sampler: Sampler) -> None:
    latent = torch.randn(5, generator=torch.Generator().manual_seed(11))
    assert torch.equal(sampler.latents([3, 11])[1], latent)
    with torch.no_grad():
        expected = to_uint8(sampler.model(latent[None], torch.tensor([2])))
    assert torch.equal(sampler.sample([11], [2]).images, expected)


def test_sampling_is_deterministic_and_draws_nothing(sampler: Sampler) -> None:
    assert not any(module.training for module in sampler.model.modules())
    torch.manual_seed(0)
    first = sampler.sample([1, 2], [0, 3], with_layouts=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = sampler.sample([1, 2], [0, 3], with_layouts=True)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.layouts["blocks.2.an"].layout, second.layouts["blocks.2.an"].layout)


def test_batches_yield_all_images_in_order(sampler: Sampler) -> None:
    seeds, labels = list(range(10)), [i % 4 for i in range(10)]
    batches = list(sampler.batches(seeds, labels))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert grey_levels_apart(torch.cat(batches), sampler.sample(seeds, labels).images) <= 1
    assert list(sampler.batches([], [])) == []


def test_layouts_come_on_request_only(sampler: Sampler) -> None:
    plain, seen = sampler.sample([0, 1], [0, 1]), sampler.sample([0, 1], [0, 1], with_layouts=True)
    assert plain.layouts == {}
    assert list(seen.layouts) == ["blocks.2.an"]
    assert torch.equal(plain.images, seen.images)
    observation = seen.layouts["blocks.2.an"]
    assert observation.layout.shape == (2, 3, 32, 32) and observation.features.shape == (2, 8, 32, 32)
    torch.testing.assert_close(observation.layout.sum(1), torch.ones(2, 32, 32))
    assert observation.layout.std() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(sampler.model.blocks[2].an.layout(observation.features), observation.layout)


def test_a_class_is_found_by_name_then_by_number_however_its_accents_are_composed(file: Path) -> None:
    sampler = Sampler(file, device="cpu")
    assert [sampler.class_index(name) for name in ("cat", "goldfish", "1", "0")] == [0, 3, 1, 0]
    assert sampler.class_index("7") == 2  # a name goes before a number
    for name, hint in (("gold fish", "did you mean goldfish"), ("4", "it has: cat, dog, 7, goldfish"), ("", "it has")):
        with pytest.raises(CheckpointError, match=hint):
            sampler.class_index(name)
    sampler.classes = ("cafe\u0301", "na\u00efve", "e\u0301", "\u00e9")  # the last two by the very name
    names = ("caf\u00e9", "nai\u0308ve", "e\u0301", "\u00e9")
    assert [sampler.class_index(name) for name in names] == [0, 1, 2, 3]
    sampler.classes = ("001", "002", "003", "1999")
    with pytest.raises(CheckpointError, match="knows no class '1'"):  # not number 1, which is 002
        sampler.class_index("1")


def test_a_walk_begins_and_ends_at_the_pure_classes(sampler: Sampler) -> None:
    walk = sampler.interpolate(3, [0, 2], 5).images
    assert len(walk) == 5
    assert grey_levels_apart(walk[:1], sampler.sample([3], [0]).images) <= 1
    assert grey_levels_apart(walk[-1:], sampler.sample([3], [2]).images) <= 1
    assert grey_levels_apart(walk[:1], walk[-1:]) > 10


def test_what_does_not_fit_together_is_refused(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="2 seeds and 1 labels"):
        sampler.sample([1, 2], [0])
    with pytest.raises(ValueError, match="1 seeds and 3 labels"):
        list(sampler.batches([1], [0, 1, 2]))
    for classes, steps in (([0], 5), ([0, 1], 1)):
        with pytest.raises(ValueError, match="expected at least 2 of each"):
            sampler.interpolate(0, classes, steps)


def test_the_middle_of_a_walk_is_the_model_with_averaged_tables(file: Path, sampler: Sampler) -> None:
    middle = sampler.interpolate(3, [1, 3], 3).images[1:2]
    averaged = Sampler(file, device="cpu")
    with torch.no_grad():
        for module in averaged.model.modules():
            if isinstance(module, ConditionalBatchNorm2d):
                for table in (module.gamma.weight, module.beta.weight):
                    table[1] = (table[1] + table[3]) / 2
    assert grey_levels_apart(middle, averaged.sample([3], [1]).images) <= 1
    assert grey_levels_apart(middle, sampler.sample([3], [1]).images) > 5


def test_a_chain_shows_each_class_once(sampler: Sampler) -> None:
    chain = sampler.interpolate(3, [0, 1, 0], 3)
    assert len(chain.images) == 5 == len(chain.layouts["blocks.2.an"].layout)
    assert grey_levels_apart(chain.images[2:3], sampler.sample([3], [1]).images) <= 1
    assert grey_levels_apart(chain.images[:2].flip(0), chain.images[3:]) <= 1  # there and back


def test_truncated_latents_are_the_quantiles_of_the_truncated_normal() -> None:
    from scipy.stats import norm, truncnorm

    latents = torch.tensor([-9.0, -2.5, -0.3, 0.0, 1e-4, 0.8, 3.0, 9.0])
    for limit in (0.05, 1.0, 4.0):
        expected = truncnorm(-limit, limit).ppf(norm.cdf(latents.double().numpy()))
        torch.testing.assert_close(truncated(latents, limit), torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(truncated(latents[1:-1], 12.0), latents[1:-1])
    with pytest.raises(ValueError, match="expected a positive number"):
        truncated(latents, 0.0)


def test_a_walk_made_one_by_one_is_the_walk(file: Path) -> None:
    sampler = Sampler(file, device="cpu")
    parts = list(sampler.walk(3, [0, 2], 3, truncation=0.5))
    whole = sampler.interpolate(3, [0, 2], 3, truncation=0.5)
    apart = torch.cat([part.images for part in parts]).int() - whole.images.int()
    assert len(parts) == 3 and apart.abs().max() <= 1
    assert not torch.equal(whole.images, sampler.interpolate(3, [0, 2], 3).images)
