"""Named runs, deriving from one another: every row of Tables 1, 3 and 4, at the paper's scale and at smaller ones.

In a family all runs have one recipe, so that only what the name says differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attnorm.config import (
    AttentiveNormConfig,
    ClassConditionalConfig,
    Config,
    DataConfig,
    InpaintingConfig,
    InpaintingTaskConfig,
    OptimiserConfig,
    ProjectedConfig,
    RelativisticConfig,
    RunConfig,
)

# Twice the paper's, in its proportion of 1 to 4: of 1,000 steps too little would come at its own.
SMALL_G_LR, SMALL_D_LR = 2e-4, 8e-4


def imagenet128() -> Config:
    """The paper's recipe (section 5.1): ImageNet at 128 pixels, batch 256, 880k steps, TTUR, AN in G and D."""
    return Config(
        model=ClassConditionalConfig(image_size=128, width=64, an=AttentiveNormConfig(temperature=0.1)),
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
        run=RunConfig(batch_size=64, duration_images=100_000 * 64, channels_last=True),
    )


def imagenette64() -> Config:
    """A 10-class ImageNet subset at 64 pixels; width 32."""
    return Config(
        model=ClassConditionalConfig(image_size=64, width=32),
        data=DataConfig(flip=True),
        run=RunConfig(batch_size=64, duration_images=100_000 * 64, channels_last=True),
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


def small32() -> Config:
    """Every row of Tables 1, 2 and 4 within minutes on two CPU cores: 32 pixels, width 32, 1,000 steps of 16 images."""
    return Config(
        model=ClassConditionalConfig(image_size=32, width=32),
        data=DataConfig(flip=True),
        optim=OptimiserConfig(g_lr=SMALL_G_LR, d_lr=SMALL_D_LR, ema_decay=0.995),
        run=RunConfig(
            batch_size=16,
            duration_images=1_000 * 16,
            precision="auto",
            channels_last=True,
            log_every_images=320,
            layout_every_images=1_600,
            grid_every_images=4_000,
            checkpoint_every_images=4_000,
            keep_checkpoints=5,  # all of them: scores against images seen
        ),
    )


def smoke_rows() -> Config:
    """The preset smoke with the paper's number of entities, from which the rows of Table 4 differ."""
    base = smoke()
    return replace(base, model=replace(base.model, an=AttentiveNormConfig()))


def streetview256() -> Config:
    """The paper's inpainting (section 4): Paris StreetView at 256 pixels. It names no batch and no number of steps."""
    return Config(
        task="inpainting",
        model=InpaintingConfig(image_size=256, width=32, an=AttentiveNormConfig(affine=False, temperature=0.1)),
        inpainting=InpaintingTaskConfig(),  # the first phase ends when the validation L1 is flat
        data=DataConfig(fit="street-view", flip=True, held_out_every=100),
        optim=OptimiserConfig(g_lr=1e-4, d_lr=1e-4, beta1=0.5, beta2=0.9, d_steps=5),
        run=RunConfig(
            batch_size=16,
            duration_images=150_000 * 16,
            log_every_images=1_600,
            layout_every_images=16_000,
            validate_every_images=16_000,
            grid_every_images=80_000,
            checkpoint_every_images=80_000,
        ),
    )


def inpaint128() -> Config:
    """Squares of 128 pixels from photographs of 224: both phases of a fixed length, so that runs compare."""
    base = streetview256()
    return replace(
        base,
        model=replace(base.model, image_size=128, an=AttentiveNormConfig(affine=False)),
        inpainting=InpaintingTaskConfig(switch_images=10_000 * 16),
        data=DataConfig(stored_size=224, flip=True, held_out_every=10),
        optim=replace(base.optim, gate_lr_scale=100.0),  # else rho is still on its way from 0 when the run ends
        run=replace(
            base.run,
            duration_images=20_000 * 16,
            channels_last=True,
            layout_every_images=8_000,
            validate_every_images=8_000,
            grid_every_images=16_000,
            checkpoint_every_images=16_000,
        ),
    )


def inpaint64() -> Config:
    """The same at half the width and half the size, reconstruction alone: 1,600 steps of 8 images, a quarter of an hour
    of one CPU core. The critics join where `run.duration_images` is longer.

    A missing pixel counts six times, and the generator learns twice as fast: after a seventh of the images what it
    fills, with seams taken out, is as near to the truth as with the paper's weights or nearer; pasted it is not
    (docs/results/inpainting.md).
    """
    base = inpaint128()
    return replace(
        base,
        model=replace(base.model, image_size=64, width=16),
        inpainting=InpaintingTaskConfig(switch_images=1_600 * 8, hole_weight=6.0),
        data=replace(base.data, stored_size=112),
        optim=replace(base.optim, g_lr=2e-4, beta2=0.99, ema_decay=0.995, gate_lr_scale=50.0),
        run=replace(
            base.run,
            batch_size=8,
            duration_images=1_600 * 8,
            precision="auto",
            log_every_images=80,
            layout_every_images=800,
            validate_every_images=800,
            grid_every_images=6_400,
            checkpoint_every_images=1_600,
        ),
    )


def inpaint128_small() -> Config:
    """inpaint64 at twice the size, and brush strokes too: from a run of it (`run.start_from`), half an hour more."""
    base = inpaint64()
    num_images = 1_000 * 8
    return replace(
        base,
        model=replace(base.model, image_size=128),
        inpainting=InpaintingTaskConfig(masks="mixed", switch_images=num_images, hole_weight=6.0),
        data=replace(base.data, stored_size=224),
        run=replace(base.run, duration_images=num_images),
    )


def inpaint_smoke() -> Config:
    """Both phases of inpainting in well under a minute on two CPU cores, for tests: nothing is learnt."""
    return Config(
        task="inpainting",
        model=InpaintingConfig(image_size=32, width=4, an=AttentiveNormConfig(num_entities=4, affine=False)),
        inpainting=InpaintingTaskConfig(masks="mixed", switch_images=10 * 8, validation_images=8),
        data=DataConfig(source="builtin", stored_size=40, flip=True, held_out_every=10),
        optim=streetview256().optim,
        run=RunConfig(
            batch_size=8,
            duration_images=20 * 8,
            log_every_images=16,
            layout_every_images=80,
            validate_every_images=40,
            grid_every_images=80,
            checkpoint_every_images=40,
        ),
    )


def cifar10_projected() -> Config:
    """CIFAR-10 worth looking at from one CPU core within hours: discriminators on features of a fixed network."""
    return Config(
        recipe="projected",
        projected=ProjectedConfig(width=32),
        model=ClassConditionalConfig(
            image_size=32,
            width=32,
            g_channels=(8, 8, 4, 2),
            latent_in_norms=True,
            g_spectral_norm=False,
            an_blocks=(2,),  # a map of 16x16
            site="insert",  # so that each arm keeps all conditional norms
        ),
        data=DataConfig(flip=True),
        optim=OptimiserConfig(g_lr=5e-4, d_lr=5e-4, beta2=0.99, ema_decay=0.999),
        run=RunConfig(
            batch_size=32,
            duration_images=600_000,
            precision="auto",
            channels_last=True,
            log_every_images=3_200,
            layout_every_images=16_000,
            grid_every_images=16_000,
            checkpoint_every_images=16_000,
        ),
    )


def cifar10_relativistic() -> Config:
    """R3GAN as published for CIFAR-10 (class-conditional, FID 1.96): 8 GPUs for days. Augmentation is ours."""
    return Config(
        recipe="relativistic",
        relativistic=RelativisticConfig(),
        model=ClassConditionalConfig(
            image_size=32, width=48, g_channels=(16, 16, 16, 16), latent_dim=64, architecture="grouped", an_blocks=(2,)
        ),
        data=DataConfig(flip=True),
        optim=OptimiserConfig(g_lr=2e-4, d_lr=2e-4, beta2=0.9),
        run=RunConfig(
            batch_size=512,
            duration_images=200_000_000,
            channels_last=True,
            log_every_images=51_200,
            layout_every_images=512_000,
            grid_every_images=1_024_000,
            checkpoint_every_images=1_024_000,
        ),
    )


def small32_relativistic() -> Config:
    """The same with 128 to 32 channels for 768, and its schedules in proportion: hours on a CPU core."""
    base = _model(width=16, g_channels=(8, 8, 4, 2))(cifar10_relativistic())
    return replace(
        base,
        relativistic=RelativisticConfig(schedule_images=200_000, last_ema_half_life=20_000),
        run=replace(
            base.run,
            batch_size=32,
            duration_images=400_000,
            log_every_images=3_200,
            layout_every_images=16_000,
            grid_every_images=16_000,
            checkpoint_every_images=16_000,
        ),
    )


Change = Callable[[Config], Config]
Rows = dict[str, tuple[str, Change]]  # by name: what it is, and how it differs from the first


def _model(**changes: object) -> Change:
    return lambda config: replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]


def _an(**changes: object) -> Change:
    return lambda config: _model(an=replace(config.model.an, **changes))(config)  # type: ignore[arg-type]


def _then(first: Change, second: Change) -> Change:
    return lambda config: second(first(config))


# The rows of Table 1, then those of Table 4 that are not among them.
ROWS: Rows = {
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
# tau by itself or as section 4 prints it: the paper's families have the latter and twins of their rows with the former,
# the others the reverse.
AUTO = {
    f"{row}-auto": (f"{description}, tau by itself", _then(change, _an(temperature="auto")))
    for row, (description, change) in ROWS.items()
    if row.startswith("an")
}
FIXED = {"an-fixed": ("AN with the paper's tau, scaled with the width (ledger, row 7)", _an(temperature=None))}
# The rows of Table 3, and the other blocks for context.
INPAINTING_ROWS: Rows = {
    "an": ("Attentive Normalization in place of contextual attention (Table 3)", lambda config: config),
    "an-wide": ("AN in the authors' released layout, whose encoders are wider", _model(context="an-wide")),
    "contextual": ("DeepFill v1's contextual attention (Table 3)", _model(context="contextual")),
    "self_attention": ("SAGAN's self-attention", _model(context="self_attention")),
    "region": ("Region Normalization of the hole and the rest (Yu et al., 2020)", _model(context="region")),
    "none": ("no block for context", _model(context="none")),
    "an-auto": AUTO["an-auto"],
    "an-fixed": FIXED["an-fixed"],
}
# Families of the inpainting task, and which rows they have.
INPAINTING_FAMILIES: dict[str, tuple[Callable[[], Config], tuple[str, ...]]] = {
    "paper-streetview256": (streetview256, ("an", "an-auto", "contextual", "none")),
    "inpaint128": (inpaint128, ("an", "an-fixed", "an-wide", "contextual", "self_attention", "region", "none")),
    "inpaint64": (inpaint64, ("an", "an-fixed", "an-wide", "contextual", "self_attention", "region", "none")),
    "inpaint128-small": (inpaint128_small, ("an", "contextual", "none")),
    "inpaint-smoke": (inpaint_smoke, ("an", "contextual", "none")),
}
# The context blocks at equal budgets, of a recipe of today.
CONTEXT_ROWS: Rows = {
    "an": ("Attentive Normalization", lambda config: config),
    "self_attention": ("self-attention", _model(context="self_attention")),
    "none": ("no context block", _model(context="none")),
}
RECIPES: dict[str, Callable[[], Config]] = {
    "cifar10-projected": cifar10_projected,
    "cifar10-relativistic": cifar10_relativistic,
    "small32-relativistic": small32_relativistic,
}
FAMILIES: dict[str, Callable[[], Config]] = {
    "paper-imagenet128": imagenet128,
    "cifar10": cifar10,
    "imagenette64": imagenette64,
    "imagenette128": imagenette128,
    "small32": small32,
    "smoke": smoke_rows,
}


def rows_of(family: str) -> Rows:
    """The rows of a class-conditional family: of Tables 1 and 4, and AN with the other choice of tau."""
    return ROWS | (AUTO if family.startswith("paper-") else FIXED)


def _build() -> dict[str, tuple[str, Config]]:
    presets: dict[str, tuple[str, Config]] = {}

    def add(family: str, base: Callable[[], Config], rows: Rows) -> None:
        for row, (description, change) in rows.items():
            config = replace(change(base()), preset=f"{family}-{row}", family=family, row=row)
            kind = (
                "inpainting: " if config.inpainting else "" if config.recipe == "paper" else f"recipe {config.recipe}: "
            )
            presets[config.preset] = (f"{kind}{description}", config)

    for family, base in FAMILIES.items():
        add(family, base, rows_of(family))
    for family, base in RECIPES.items():
        add(family, base, CONTEXT_ROWS)
    for family, (base, rows) in INPAINTING_FAMILIES.items():
        add(family, base, {row: INPAINTING_ROWS[row] for row in rows})
    for single in (demo, smoke, inpaint_smoke):
        name = single.__name__.replace("_", "-")
        description = (single.__doc__ or "").strip().rstrip(".")
        presets[name] = (description, replace(single(), preset=name))
    return presets


PRESETS: dict[str, tuple[str, Config]] = _build()
