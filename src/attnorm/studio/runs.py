"""The part of the HTTP API that shows run directories, live while they train (server-sent events)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response, StreamingResponse

from attnorm.config import UserError
from attnorm.studio.jobs import TooBusy
from attnorm.studio.service import Service

SECONDS_BETWEEN_LOOKS = 0.5  # at the files of runs that are watched


def add_runs(app: FastAPI, service: Service) -> None:
    watching = 0

    @app.get("/api/runs", tags=["runs"])
    def runs() -> dict[str, dict[str, Any]]:
        """Run directories by name, and how far each is."""
        listed: dict[str, dict[str, Any]] = {}
        for name, path in service.runs().items():
            try:
                listed[name] = service.status(service.run(name))
            except (UserError, OSError) as error:
                listed[name] = {"problem": str(error) or f"{path.name} cannot be read"}
        return listed

    @app.get("/api/runs/events", tags=["runs"], response_class=StreamingResponse)
    async def events(request: Request, run: Annotated[list[str], Query(min_length=1, max_length=16)]) -> Response:
        """What runs log, while they train: server-sent events `rows` (of metrics.jsonl) and `status`, in JSON."""
        nonlocal watching
        for name in run:
            service.run(name)
        if watching >= service.limits.streams:
            raise TooBusy(f"{watching} pages watch runs already; close one")

        async def stream() -> AsyncIterator[str]:
            nonlocal watching
            watching += 1
            try:
                seen: dict[str, Any] = {}
                quiet = 0
                while not await request.is_disconnected():
                    parts = await asyncio.to_thread(_news, service, run, seen)
                    quiet = 0 if parts else quiet + 1
                    for part in parts:
                        yield part
                    if quiet % 20 == 19:
                        yield ": still here\n\n"
                    await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                watching -= 1

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    @app.get("/api/runs/{name}/samples/{images_seen}", tags=["runs"], response_class=Response)
    def samples(name: str, images_seen: int) -> Response:
        """A grid of samples, as a PNG file."""
        return Response(service.sample_grid(service.run(name), images_seen), media_type="image/png")


def _news(service: Service, names: list[str], seen: dict[str, Any]) -> list[str]:
    """Events of what has changed since the last look, which `seen` is brought up to."""
    parts = []
    for name in names:
        try:
            run = service.run(name)
            state = run.metrics_file.stat() if run.metrics_file.exists() else None
            version = (state.st_mtime_ns, state.st_size) if state else None
            status = service.status(run)
            status.pop("seconds_since_change")
            if seen.get(f"{name} status") != status:
                seen[f"{name} status"] = status
                parts.append(_event("status", {"run": name, **status}))
            if version == seen.get(f"{name} version", ()):
                continue
            seen[f"{name} version"] = version
            rows = service.metrics(run)
            known = seen.get(f"{name} rows", [])
            is_continued = rows[: len(known)] == known  # a resumed run drops what lies after its checkpoint
            new = rows[len(known) :] if is_continued else rows
            seen[f"{name} rows"] = rows
            if new or not is_continued:
                parts.append(_event("rows", {"run": name, "anew": not is_continued, "rows": new}))
        except (UserError, OSError) as error:
            if seen.get(f"{name} problem") != str(error):
                seen[f"{name} problem"] = str(error)
                parts.append(_event("problem", {"run": name, "problem": str(error)}))
    return parts


def _event(kind: str, value: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(value, allow_nan=False)}\n\n"
