"""The live page `/eagle`, through vLLM's entry point group `vllm.endpoint_plugins`: routes that only read.

vLLM asks for the API key under /v1 and a few other prefixes only, so this file asks itself. A browser cannot send the key when it
opens a page, so the page holds no data, is served to anyone, and sends the key when it fetches `/eagle/data.json`.
"""

import asyncio
import functools
import logging
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import vllm.envs as envs
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logging_utils import UvicornAccessLogFilter

from vllm_eagle.serving.feed import Feed

# The page needs its own script, style and data, and nothing else from anywhere.
_PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
_FILES = {"/eagle": "text/html", "/eagle/page.css": "text/css", "/eagle/page.js": "text/javascript"}


class EaglePage:
    """vLLM's endpoint plugin for the page."""

    name = "eagle_trees"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._feed: Feed | None = None
        self._keys: AuthenticationMiddleware | None = None
        self._sampling: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. They take no parameters, so nothing in a request reaches the engine."""
        for path, media_type in _FILES.items():
            file = Path(__file__).with_name("page.html" if path == "/eagle" else Path(path).name)
            _add(app, path, functools.partial(_static, file.read_bytes(), media_type))
        _add(app, "/eagle/data.json", self._guarded(_data))
        _add(app, "/eagle/metrics", self._guarded(_metrics))
        # A browser asks once a second.
        logging.getLogger("uvicorn.access").addFilter(UvicornAccessLogFilter(["/eagle/data.json"]))

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Called by vLLM when the engine is there."""
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        self._keys = AuthenticationMiddleware(_unused, keys) if keys else None
        if engine_client is not None:
            self._feed = Feed(engine_client)
            self._sampling = asyncio.create_task(self._feed.sample())

    def _guarded(self, answer: Callable[[Feed], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            origin = request.headers.get("origin")
            if origin is not None and not _is_own(origin, request.headers.get("host")):
                # vLLM lets pages of any site read its answers; these may hold what users wrote.
                return _problem(403, "Only the page of this server may read this.")
            if self._keys is not None and not self._keys.verify_token(request.headers):
                return _problem(401, "This server wants its API key.", {"WWW-Authenticate": "Bearer"})
            if self._feed is None:
                return _problem(503, "The server is starting.")
            if self._feed.dead:
                return _problem(503, "The engine is dead; the server's log says why. Start the server anew.")
            return await answer(self._feed)

        return guarded


def _is_own(origin: str, host: str | None) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:  # no URL at all
        return False


async def _data(feed: Feed) -> Response:
    return JSONResponse(await feed.data(), headers=_HEADERS)


async def _metrics(feed: Feed) -> Response:
    """The metrics of /metrics that are ours, asked for as the page's data are."""
    registry = CollectorRegistry()
    collector = await feed.collector()
    if collector is not None:
        registry.register(collector)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST, headers=_HEADERS)


async def _static(content: bytes, media_type: str) -> Response:
    return Response(content, media_type=media_type, headers=_HEADERS | {"Content-Security-Policy": _PAGE_POLICY})


def _problem(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, {**_HEADERS, **(headers or {})})


def _add(app: FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
    app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)


async def _unused(*_: Any) -> None:
    """The application that the middleware would guard, if it were used as one."""
