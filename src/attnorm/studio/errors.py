"""How the HTTP API answers where something is wrong."""

from __future__ import annotations

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from attnorm.config import UserError, printable
from attnorm.studio.jobs import Cancelled, TooBusy, TooLong
from attnorm.studio.service import NotFound


def answer_errors(app: FastAPI) -> None:
    """Every error is JSON, {"error": text}, in words for the one who asked."""

    def answer(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": text}, status, headers or None)

    @app.exception_handler(UserError)
    async def mistake(_: Request, error: UserError) -> JSONResponse:
        match error:
            case TooBusy():
                return answer(503, str(error), **{"retry-after": "5"})
            case TooLong():
                return answer(504, str(error))
            case NotFound():
                return answer(404, str(error))
        return answer(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        told = [f"{'.'.join(map(str, part['loc'][1:])) or part['loc'][0]}: {part['msg']}" for part in error.errors()]
        return answer(422, printable("; ".join(told))[:1000])

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(Cancelled)
    async def cancelled(_: Request, __: Cancelled) -> JSONResponse:
        return answer(499, "the request was cancelled")

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return answer(507, "there is too little memory for this; ask for fewer or smaller images")
        return answer(500, "this failed inside the studio, which goes on; its terminal says how")
