"""Named runs, deriving from one another: every row of Tables 1 and 4, at the paper's scale and at smaller ones.

In a family all runs have one recipe, so that only what the name says differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attnorm.config import AttentiveNormConfig, ClassConditionalConfig, Config, DataConfig, OptimiserConfig, RunConfig


def imagenet128() -> Config:
    """The paper's recipe (section 5.1): ImageNet at 128 pixels, batch 256, 880k steps, TTUR, AN in G and D."""
    return Config(
        model=ClassConditionalConfig(image_size=128, width=64),
        optim=OptimiserConfig(ema_decay=0.9999),
        run=RunConfig(
            batch_size=256,
            duration_images=880_000 * 256,
            log_every_images=25_600,
            layout_every_images=256_000,
            grid_every_images=1_280_000,
            checkpoint_every_images=1_280_000,
        ),
    )


def cifar10() -> Config:
    """The same recipe at 32 pixels: flat networks, batch 64, 100k steps."""
    return Config(
        model=ClassConditionalConfig(image_size=32, width=64),
        run=RunConfig(batch_size=64, duration_images=100_000 * 64),
    )


def imagenette64() -> Config:
    """A 10-class ImageNet subset at 64 pixels; width 32."""
    return Config(
        model=ClassConditionalConfig(image_size=64, width=32),
        data=DataConfig(flip=True),
        run=RunConfig(batch_size=64, duration_images=100_000 * 64),
    )


def imagenette128() -> Config:
    """A 10-class ImageNet subset at 128 pixels, width 32."""
    base = imagenette64()
    return replace(base, model=replace(base.model, image_size=128))


def demo() -> Config:
    """What `make demo` trains: the built-in photographs at 32 pixels, at most five minutes on two CPU cores."""
    return Config(
        model=ClassConditionalConfig(image_size=32, width=8),
        data=DataConfig(source="builtin"),
        # Ten photographs in some 1,500 steps: learning rates far above the paper's, and a short average.
        optim=OptimiserConfig(g_lr=2e-3, d_lr=2e-3, ema_decay=0.99),
        run=RunConfig(
            batch_size=16,
            duration_images=3_000 * 16,
            max_minutes=4.5,
            precision="auto",
            channels_last=True,
            log_every_images=320,
            layout_every_images=3_200,
            grid_every_images=6_400,
            checkpoint_every_images=6_400,
        ),
    )


def smoke() -> Config:
    """Trains in well under a minute on two CPU cores, for tests: every part is there, nothing is learnt."""
    return Config(
        model=ClassConditionalConfig(image_size=32, width=4, an=AttentiveNormConfig(num_entities=4)),
        data=DataConfig(source="builtin"),
        run=RunConfig(
            batch_size=8,
            duration_images=20 * 8,
            log_every_images=16,
            layout_every_images=80,
            grid_every_images=80,
            checkpoint_every_images=80,
        ),
    )


def _model(**changes: object) -> Callable[[Config], Config]:
    return lambda config: replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]


def _an(**changes: object) -> Callable[[Config], Config]:
    return lambda config: replace(
        config,
        model=replace(config.model, an=replace(config.model.an, **changes)),  # type: ignore[arg-type]
    )


# The rows of Table 1, then those of Table 4 that are not among them.
ROWS: dict[str, tuple[str, Callable[[Config], Config]]] = {
    "an": ("Attentive Normalization, n = 16 (Tables 1 and 4)", lambda config: config),
    "sagan": ("self-attention, spectral norm in G and D (Table 1)", _model(context="self_attention")),
    "sngan": ("no context block, spectral norm in D only (Table 1)", _model(context="none", g_spectral_norm=False)),
    "sngan-star": ("no context block, spectral norm in G and D (Table 1)", _model(context="none")),
    "acgan": (
        "auxiliary classifier, otherwise as sngan; a re-creation (Table 1)",
        _model(context="none", g_spectral_norm=False, head="auxiliary"),
    ),
    "an-n8": ("AN with 8 entities (Table 4)", _an(num_entities=8)),
    "an-n32": ("AN with 32 entities (Table 4)", _an(num_entities=32)),
    "an-no-ssr": ("AN without self-sampling regularization (Table 4)", _an(self_sampling=False)),
    "an-no-orth": (
        "AN without orthogonality (Table 4)",
        lambda config: replace(config, optim=replace(config.optim, orthogonality_weight=0.0)),
    ),
    "an-bn": ("AN with batch moments (Table 4, 'w BN')", _an(moments="batch")),
}
FAMILIES: dict[str, Callable[[], Config]] = {
    "paper-imagenet128": imagenet128,
    "cifar10": cifar10,
    "imagenette64": imagenette64,
    "imagenette128": imagenette128,
}


def _build() -> dict[str, tuple[str, Config]]:
    presets = {}
    for family, base in FAMILIES.items():
        for row, (description, change) in ROWS.items():
            name = f"{family}-{row}"
            presets[name] = (description, replace(change(base()), preset=name))
    for single in (demo, smoke):
        description = (single.__doc__ or "").strip().rstrip(".")
        presets[single.__name__] = (description, replace(single(), preset=single.__name__))
    return presets


PRESETS: dict[str, tuple[str, Config]] = _build()
