"""What the HTTP API takes and gives: its documentation is made of this."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Header
from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**63, description="Of the latent; image number i has seed + i.")]
Truncation = Annotated[
    float | None, Field(gt=0, le=10, description="Latents are kept within this; none: as they are drawn.")
]
ClassName = Annotated[str, Field(max_length=300, description="A class's name, or its number.")]
ModelName = Annotated[str, Field(max_length=300, description="A model's id, as /api/models lists it.")]


JobName = Annotated[
    str | None,
    Header(
        alias="x-job",
        max_length=64,
        pattern="^[A-Za-z0-9_-]{8,64}$",
        description="A name of your choice, for /api/jobs/NAME.",
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GenerateRequest(_Body):
    model: ModelName
    classes: Annotated[list[ClassName], Field(min_length=1, max_length=1000)]
    seed: Seed = 0
    count: Annotated[int, Field(ge=1, le=1000, description="Images of each class.")] = 8
    truncation: Truncation = None
    format: Annotated[
        Literal["json", "png", "zip"], Field(description="png: one picture, of several images a grid.")
    ] = "json"


class InterpolateRequest(_Body):
    model: ModelName
    classes: Annotated[list[ClassName], Field(min_length=2, max_length=100)]
    seed: Seed = 0
    steps: Annotated[int, Field(ge=2, le=1000, description="From a class to the next, both ends included.")] = 16
    truncation: Truncation = None
    format: Annotated[Literal["json", "png", "gif"], Field(description="png: a strip.")] = "json"


class LayoutRequest(_Body):
    model: ModelName
    label: Annotated[str, Field(alias="class", max_length=300, description="A class's name, or its number.")]
    seed: Seed = 0
    truncation: Truncation = None
    off: Annotated[list[int], Field(max_length=1000, description="Entities that are to win no pixel.")] = []
    exchange: Annotated[tuple[int, int] | None, Field(description="Two entities that are to change places.")] = None
    site: Annotated[str, Field(max_length=300, description="The AN layer that this is of; the first one.")] = ""


class Recipe(BaseModel):
    """What gives the same result again on the same machine: send `request` to the same address."""

    attnorm: str
    model: str
    checkpoint: str
    checkpoint_sha256: str
    images_seen: int
    device: str
    threads: int
    note: str
    request: dict[str, Any]


class ModelOut(BaseModel):
    id: str
    task: str
    context: str
    image_size: int
    classes: list[str]
    entities: int
    preset: str
    source: str
    problem: str = Field(description="Why it cannot be used; empty if it can.")
    about: str = Field(description="What is known of a model that comes with the package.")


class ModelsOut(BaseModel):
    models: list[ModelOut]
    methods: dict[str, str] = Field(description="Ways to fill holes that need no model.")
    examples: list[str] = Field(description="Photographs at /api/examples/NAME.")
    limits: dict[str, float]


class ImageOut(BaseModel):
    label: str = Field(serialization_alias="class")
    seed: int
    png: str = Field(description="A PNG file in base64.")


class GenerateOut(BaseModel):
    images: list[ImageOut]
    seconds: float
    recipe: Recipe


class MapsOut(BaseModel):
    entities: int
    height: int
    width: int
    shares: str = Field(description="Base64 of entities x height x width bytes: 255 where all of a pixel is one's.")


class InterpolateOut(BaseModel):
    images: list[str] = Field(description="PNG files in base64.")
    maps: list[MapsOut]
    entity: int = Field(description="The one whose map varies most.")
    seconds: float
    recipe: Recipe


class SiteOut(BaseModel):
    name: str
    maps: MapsOut
    facts: dict[str, Any] = Field(description="Entropy, usage, rho, spread, change, verdict; statistics of regions.")


class LayoutOut(BaseModel):
    png: str
    sites: list[SiteOut]
    edited_png: str | None
    edited_sites: list[SiteOut]
    seconds: float
    recipe: Recipe


class ViewOut(BaseModel):
    box: tuple[int, int, int, int] = Field(description="Top, left, bottom and right of the window that was seen.")
    maps: MapsOut
    patches: list[int] | None = Field(
        default=None,
        description="Of contextual attention: the hole's patches, numbered row by row. In place of an entity's map "
        "there is one for each of them: 255 where most of it comes from.",
    )


class InpaintOut(BaseModel):
    method: str
    file: str = Field(description="The whole photograph in base64, of `media_type`.")
    media_type: str
    box: tuple[int, int, int, int] = Field(description="Top, left, bottom and right of the hole.")
    patch: str = Field(description="The box as a PNG file in base64, transparent where the photograph stays.")
    views: list[ViewOut]
    scores: dict[str, float]
    note: str
    seconds: float
    recipe: dict[str, Any]


class PhotographOut(BaseModel):
    width: int
    height: int
    format: str
    mode: str
    note: str
    preview: str = Field(description="A PNG file in base64, reduced to at most 2048 pixels a side.")


class JobOut(BaseModel):
    state: Literal["waiting", "running", "done"]
    before: int = Field(description="How many requests are before it.")
    done: int
    total: int


class HealthOut(BaseModel):
    status: Literal["ok"]
    version: str
    device: str
    requests: int = Field(description="That wait or are worked on.")
