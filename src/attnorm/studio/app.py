"""The studio's HTTP API, with OpenAPI, and its page; `attnorm studio` serves both."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from fastapi import FastAPI, Header, HTTPException, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.staticfiles import StaticFiles

from attnorm import __version__
from attnorm.config import UserError, printable
from attnorm.inference.inpainter import View
from attnorm.studio import results
from attnorm.studio import service as studio
from attnorm.studio.errors import answer_errors
from attnorm.studio.guard import Guard
from attnorm.studio.jobs import Cancelled, Job, Jobs
from attnorm.studio.runs import add_runs
from attnorm.studio.schema import (
    GenerateOut,
    GenerateRequest,
    HealthOut,
    ImageOut,
    InpaintOut,
    InterpolateOut,
    InterpolateRequest,
    JobName,
    JobOut,
    LayoutOut,
    LayoutRequest,
    MapsOut,
    ModelName,
    ModelOut,
    ModelsOut,
    PhotographOut,
    Recipe,
    SiteOut,
    ViewOut,
)
from attnorm.studio.service import CLASSICAL, NotFound, Service

_log = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
T = TypeVar("T")

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "TIFF": "image/tiff",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "PPM": "image/x-portable-pixmap",
}
_FILE = {"type": "string", "format": "binary"}
_INPAINT_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "mask"],
                "properties": {
                    "image": _FILE | {"description": "A photograph of any format that `attnorm inpaint` reads."},
                    "mask": _FILE | {"description": "A picture of its size, white where something is missing."},
                },
            }
        },
        "image/*": {"schema": _FILE | {"description": "A photograph by itself; say `hole` in the address."}},
    },
}


def create_app(service: Service, *, hosts: Collection[str] = (), token: str = "") -> FastAPI:
    """The studio as an ASGI application; see `Guard` for `hosts` and `token`."""
    limits = service.limits
    jobs = Jobs(waiting=limits.waiting, seconds=limits.seconds)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        jobs.close()

    app = FastAPI(
        title="attnorm studio",
        version=__version__,
        description="Attentive Normalization: generate, morph, see the layer, fill holes, watch runs.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
    )
    app.add_middleware(Guard, hosts=hosts, token=token, upload_bytes=limits.upload_bytes)
    answer_errors(app)

    _add_studio(app, service, jobs)
    _add_models(app, service)
    _add_generators(app, service, jobs)
    _add_layout(app, service, jobs)
    _add_photographs(app, service, jobs)
    add_runs(app, service)
    _add_page(app)
    return app


async def _work(jobs: Jobs, request: Request, name: str | None, function: Callable[[Job], T]) -> tuple[T, float]:
    """The outcome of `function` in the queue, and its seconds; cancelled if the one who asked goes away."""
    begun = [0.0, 0.0]

    def timed(job: Job) -> T:
        begun[0] = time.perf_counter()
        try:
            return function(job)
        finally:
            begun[1] = time.perf_counter()

    job = jobs.submit(timed, name or "")
    result = asyncio.wrap_future(job.result)
    try:
        while not (await asyncio.wait([result], timeout=0.1))[0]:
            if await request.is_disconnected():
                raise Cancelled
        return await result, begun[1] - begun[0]
    except asyncio.CancelledError:
        raise Cancelled from None
    finally:
        job.cancel()
        result.cancel()  # whatever the work still ends with, nobody is to be told


def _add_studio(app: FastAPI, service: Service, jobs: Jobs) -> None:
    @app.get("/healthz", tags=["studio"])
    def health() -> HealthOut:
        """Whether the studio answers, and how much it has to do."""
        device = "cuda" if service.device != "cpu" and torch.cuda.is_available() else "cpu"
        return HealthOut(status="ok", version=__version__, device=device, requests=jobs.length)

    @app.get("/api/jobs/{name}", tags=["studio"])
    def job_state(name: str) -> JobOut:
        """How far a request is that was sent with the header x-job; done, too, where none of that name is known."""
        found = jobs.find(name)
        if found is None:
            return JobOut(state="done", before=0, done=0, total=0)
        job, before = found
        return JobOut(state=job.state, before=before, done=job.done, total=job.total)

    @app.delete("/api/jobs/{name}", tags=["studio"], status_code=204)
    def cancel(name: str) -> None:
        """Ends a request that was sent with the header x-job; closing its connection does so too."""
        found = jobs.find(name)
        if found is not None:
            found[0].cancel()


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/api/models", tags=["models"])
    def models() -> ModelsOut:
        """Models at hand, and what else is."""
        listed = [
            ModelOut(
                id=model.id,
                task=model.task,
                context=model.context,
                image_size=model.image_size,
                classes=[printable(name) for name in model.classes],
                entities=model.num_entities,
                preset=printable(model.preset),
                source=model.source,
                problem=model.problem,
                about=model.about,
            )
            for model in service.models()
        ]
        allowed = {
            name: getattr(service.limits, name) for name in ("upload_bytes", "pixels", "images", "steps", "seconds")
        }
        return ModelsOut(models=listed, methods=CLASSICAL, examples=list(service.examples()), limits=allowed)


def _add_generators(app: FastAPI, service: Service, jobs: Jobs) -> None:
    @app.post("/api/generate", tags=["generators"], response_model=GenerateOut)
    async def generate(request: Request, body: GenerateRequest, x_job: JobName = None) -> Any:
        """Images of classes, from latents that follow from the seed. What `attnorm sample` makes, to the last bit."""

        def make(job: Job) -> tuple[Any, dict[str, Any], Any]:
            pictures = service.generate(body.model, body.classes, body.seed, body.count, body.truncation, job)
            recipe = service.recipe(body.model, service.sampler(body.model), body.model_dump())
            match body.format:
                case "zip":
                    return pictures, recipe, results.archive(pictures, recipe)
                case "png":
                    return pictures, recipe, results.png(results.grid([p.pixels for p in pictures], body.count))
            return pictures, recipe, [_base64(results.png(picture.pixels)) for picture in pictures]

        (pictures, recipe, made), seconds = await _work(jobs, request, x_job, make)
        if body.format != "json":
            return _file(made, "application/zip" if body.format == "zip" else "image/png", recipe)
        images = [
            ImageOut(label=printable(picture.label), seed=picture.seed, png=text)
            for picture, text in zip(pictures, made, strict=True)
        ]
        return GenerateOut(images=images, seconds=seconds, recipe=Recipe(**recipe))

    @app.post("/api/interpolate", tags=["generators"], response_model=InterpolateOut)
    async def interpolate(request: Request, body: InterpolateRequest, x_job: JobName = None) -> Any:
        """A walk from class to class with one latent (Figure 8): JSON, a strip (png) or an animation (gif)."""

        def make(job: Job) -> tuple[results.Walk, dict[str, Any], Any]:
            walk = service.interpolate(body.model, body.classes, body.seed, body.steps, body.truncation, job)
            recipe = service.recipe(body.model, service.sampler(body.model), body.model_dump())
            match body.format:
                case "gif":
                    return walk, recipe, results.gif(walk)
                case "png":
                    return walk, recipe, results.strip(walk)
            return walk, recipe, [_base64(results.png(image)) for image in walk.images]

        (walk, recipe, made), seconds = await _work(jobs, request, x_job, make)
        if body.format != "json":
            return _file(made, f"image/{body.format}", recipe)
        maps = [] if walk.layout is None else [_maps(layout) for layout in walk.layout]
        return InterpolateOut(images=made, maps=maps, entity=walk.entity, seconds=seconds, recipe=Recipe(**recipe))


def _add_layout(app: FastAPI, service: Service, jobs: Jobs) -> None:
    @app.post("/api/layout", tags=["generators"])
    async def layout(request: Request, body: LayoutRequest, x_job: JobName = None) -> LayoutOut:
        """What each AN layer saw of one image; and the image again with entities switched off or exchanged."""

        def make(job: Job) -> tuple[studio.Seen, dict[str, Any]]:
            seen = service.see(
                body.model, body.label, body.seed, body.truncation, body.off, body.exchange, body.site, job
            )
            return seen, service.recipe(body.model, service.sampler(body.model), body.model_dump(by_alias=True))

        (seen, recipe), seconds = await _work(jobs, request, x_job, make)
        return LayoutOut(
            png=_base64(results.png(seen.image)),
            sites=[_site(site) for site in seen.sites],
            edited_png=None if seen.edited is None else _base64(results.png(seen.edited)),
            edited_sites=[_site(site) for site in seen.edited_sites],
            seconds=seconds,
            recipe=Recipe(**recipe),
        )


def _add_photographs(app: FastAPI, service: Service, jobs: Jobs) -> None:
    @app.post(
        "/api/inpaint",
        tags=["photographs"],
        response_model=InpaintOut,
        openapi_extra={"requestBody": _INPAINT_BODY},
        responses={200: {"content": {"image/*": {"schema": _FILE}}}},
    )
    async def inpaint(
        request: Request,
        method: Annotated[ModelName, Query(description="A model's id, telea or mean.")],
        hole: Annotated[
            list[Annotated[str, Field(pattern=r"^\d{1,6},\d{1,6},\d{1,6},\d{1,6}$")]],
            Query(max_length=100, description="Instead of a mask: left,top,width,height; may be repeated."),
        ] = [],  # noqa: B006
        format: Annotated[
            Literal["", "PNG", "TIFF"], Query(description="Of the result; that of the photograph unless said.")
        ] = "",
        invert: Annotated[bool, Query(description="Black is missing instead.")] = False,
        layouts: Annotated[bool, Query(description="Say what AN saw, or what contextual attention took.")] = False,
        scores: Annotated[bool, Query(description="What is under the hole is the truth: compare.")] = False,
        accept: Annotated[str, Header()] = "*/*",
        x_job: JobName = None,
    ) -> Any:
        """Fills a hole of a photograph. Outside it every pixel stays, bit for bit (JPEG says what it changes).

        The answer is a file in the photograph's format with its metadata, and the recipe in the header
        `attnorm-recipe`; with `Accept: application/json` both in JSON, with layouts and scores.
        """
        name, image, sent = await _read_photograph(request, needs_mask=not hole)

        def make(job: Job) -> tuple[results.Repaired, dict[str, Any], InpaintOut | None]:
            mask = sent or _rectangles(service, name, image, hole)
            repaired = service.repair(
                method, name, image, mask, job, format=format, invert=invert, with_layouts=layouts, with_scores=scores
            )
            asked = {"method": method, "format": format, "invert": invert, "name": printable(name)}
            asked |= {"image_sha256": results.sha256(image), "mask_sha256": results.sha256(mask)}
            recipe: dict[str, Any] = {"attnorm": __version__, "request": asked}
            if method not in CLASSICAL:
                inpainter = service.inpainter(method)
                recipe = service.recipe(method, inpainter, asked | {"seams": inpainter.seams})
            return repaired, recipe, _repaired(method, repaired, recipe) if "json" in accept else None

        (repaired, recipe, answer), seconds = await _work(jobs, request, x_job, make)
        if answer is None:
            return _file(repaired.data, MEDIA_TYPES[repaired.format], recipe)
        return answer.model_copy(update={"seconds": seconds})

    @app.post("/api/photograph", tags=["photographs"], openapi_extra={"requestBody": _INPAINT_BODY})
    async def photograph(request: Request, x_job: JobName = None) -> PhotographOut:
        """Whether a photograph can be used, and how it looks as the networks see it, turned as its EXIF data say."""
        name, image, _ = await _read_photograph(request, needs_mask=False)

        def make(job: Job) -> PhotographOut:
            read = service.photograph(name, image)
            height, width = read.size
            return PhotographOut(
                width=width,
                height=height,
                format=read.format,
                mode=read.mode,
                note=read.note,
                preview=_base64(results.preview(read.rgb())),
            )

        return (await _work(jobs, request, x_job, make))[0]

    @app.get("/api/examples/{name}", tags=["photographs"], response_class=Response)
    def example(name: str) -> Response:
        """A photograph to try, as a PNG file."""
        examples = service.examples()
        if name not in examples:
            raise NotFound(f"there is no example {name!r}; there are: {', '.join(examples)}")
        return Response(examples[name](), media_type="image/png")


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", media_type="text/html; charset=utf-8")

    @app.get("/api/docs", include_in_schema=False)
    def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", media_type="text/html; charset=utf-8")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


async def _read_photograph(request: Request, *, needs_mask: bool) -> tuple[str, bytes, bytes]:
    """Name and content of the photograph in a request, and its mask's content."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=2, max_fields=4, max_part_size=64 * 1024) as form:
            parts = {}
            for name in ("image", "mask"):
                part = form.get(name)
                parts[name] = await part.read() if isinstance(part, UploadFile) else b""
            image_part = form.get("image")
            name = (isinstance(image_part, UploadFile) and image_part.filename) or ""
        image, mask = parts["image"], parts["mask"]
    elif kind.startswith("image/") or kind == "application/octet-stream":
        name, image, mask = "image", await request.body(), b""
    else:
        raise HTTPException(415, f"got {kind[:100] or 'nothing'}; expected multipart/form-data, or an image")
    if not image:
        raise UserError("there is no image; expected a file in the part `image`")
    if needs_mask and not mask:
        raise UserError("there is no mask; expected a file in the part `mask`, or hole=left,top,width,height")
    return (name or "image")[:200], image, mask  # a name stands in messages, as text, and in nothing else


def _rectangles(service: Service, name: str, image: bytes, holes: list[str]) -> bytes:
    height, width = service.photograph(name, image).size
    mask = torch.zeros(height, width, dtype=torch.uint8)
    for hole in holes:
        left, top, wide, high = map(int, hole.split(","))
        if not wide or not high or left + wide > width or top + high > height:
            raise UserError(f"the hole {hole} is not inside the image of {width}x{height} pixels")
        mask[top : top + high, left : left + wide] = 255
    return results.png(mask[None].expand(3, -1, -1))


def _repaired(method: str, repaired: results.Repaired, recipe: dict[str, Any]) -> InpaintOut:
    box, patch = results.patch(repaired)
    return InpaintOut(
        method=method,
        file=_base64(repaired.data),
        media_type=MEDIA_TYPES[repaired.format],
        box=box,
        patch=_base64(patch),
        views=[_view(view) for view in repaired.views],
        scores=repaired.scores,
        note=repaired.note,
        seconds=0,
        recipe=recipe,
    )


def _view(view: View) -> ViewOut:
    if view.matches is None:
        assert view.layout is not None
        return ViewOut(box=view.box, maps=_maps(view.layout))
    patches, weights = view.matches
    largest = weights.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return ViewOut(box=view.box, maps=_maps(weights / largest), patches=patches.tolist())


def _site(site: studio.Site) -> SiteOut:
    return SiteOut(name=site.name, maps=_maps(site.layout), facts=site.facts)


def _maps(layout: torch.Tensor) -> MapsOut:
    entities, height, width = layout.shape
    return MapsOut(entities=entities, height=height, width=width, shares=_base64(results.to_bytes(layout)))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _file(data: bytes, media_type: str, recipe: dict[str, Any]) -> Response:
    return Response(data, media_type=media_type, headers={"attnorm-recipe": json.dumps(recipe)})
