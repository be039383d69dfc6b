"""The explorer as a page of this machine: one address, which only who knows its token can ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import LoopedError
from ._page import page
from .session import Session

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
LONGEST = 1_000_000  # bytes of a question
OFTEN = 0.05  # seconds between two words of progress
TABS = 8  # questions that may wait at a time
LOOK = 0.2  # seconds after which a tab that was closed is noticed


def need_server() -> None:
    """Refuse where the packages of the extra are not installed.

    Raises:
        LoopedError: one is missing.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise LoopedError(
            f"the explorer's page needs {missing[0]}, which is not installed; run `pip install 'tl-looped[explore]'`."
        )


@dataclass
class Serving:
    """A page that is being served, or will be.

    Args:
        session: what answers.
        port: where.
        token: what the address ends with and every question carries.
        closing: set when it ends, so that what is being computed is given up.
    """

    session: Session
    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    closing: threading.Event = field(default_factory=threading.Event)
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TABS, "explorer"))

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    def app(self) -> Starlette:
        """The application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncGenerator[None]:
            yield
            self.closing.set()
            self.workers.shutdown(wait=False, cancel_futures=True)

        routes = [Route("/", self._page, methods=["GET"]), Route("/ask", self._ask, methods=["POST"])]
        return Starlette(routes=routes, lifespan=lifespan)

    def _refused(self, request: Request, token: str) -> bool:
        """Whether a request is from elsewhere, or by somebody who does not know the token."""
        hosts = {f"{name}:{self.port}" for name in (HOST, "localhost")}
        origin = request.headers.get("origin")
        of_here = request.headers.get("host") in hosts and (origin is None or origin.removeprefix("http://") in hosts)
        return not (of_here and secrets.compare_digest(token.encode(), self.token.encode()))

    async def _page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse, PlainTextResponse

        if self._refused(request, request.query_params.get("token", "")):
            return PlainTextResponse("Open the address that tl-looped explore printed, with its token.", 403)
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        return HTMLResponse(page(str(self.session.model.cfg.model_name), self.token, nonce), headers=headers)

    async def _ask(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse, StreamingResponse

        if self._refused(request, request.headers.get("x-explorer-token", "")):
            return PlainTextResponse("This question does not come from the page of tl-looped explore.", 403)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LONGEST:
                return PlainTextResponse(f"A question has at most {LONGEST} bytes.", 400)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            return PlainTextResponse("A question is JSON.", 400)
        lines = self._lines(message, request)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    async def _lines(self, message: Any, request: Request) -> AsyncIterator[str]:
        """Progress and the reply, a line of JSON each; a tab that is closed ends the work."""
        loop = asyncio.get_running_loop()
        said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        gone = threading.Event()
        self.workers.submit(self._work, message, gone, lambda line: loop.call_soon_threadsafe(said.put_nowait, line))
        try:
            while not self.closing.is_set():
                try:
                    line = await asyncio.wait_for(said.get(), LOOK)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                yield json.dumps(line) + "\n"
                if "reply" in line:
                    return
        finally:
            gone.set()

    def _work(self, message: Any, gone: threading.Event, tell: Callable[[dict[str, Any]], Any]) -> None:
        """Answer one question, in a thread of its own."""
        last = 0.0

        def progress(share: float, what: str) -> None:
            nonlocal last
            if time.monotonic() - last > OFTEN:
                last = time.monotonic()
                tell({"share": share, "what": what})

        try:
            reply = self.session.answer(message, progress, lambda: gone.is_set() or self.closing.is_set())
            json.dumps(reply, allow_nan=False)
        except Exception as error:  # a mistake of the package: the page says so, and goes on
            traceback.print_exc(file=sys.stderr)
            reply = {"error": f"This failed, which is a mistake in tl_looped: {type(error).__name__}: {error}"}
        with contextlib.suppress(RuntimeError):  # the page ended meanwhile, and with it the loop of events
            tell({"reply": reply})


def listening(port: int) -> socket.socket:
    """A socket of this machine.

    Args:
        port: which; 0 for a free one.

    Raises:
        LoopedError: the port is taken, or there is no such port.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise LoopedError(f"port={port} was asked, but it cannot be used: {error}; choose another by --port.") from None
    return found


def serve(session: Session, port: int = 0, ready: Callable[[str], Any] | None = None) -> None:
    """Serve the page until the process is interrupted.

    Args:
        session: what answers.
        port: where; 0 for a free port.
        ready: is called with the address once the page can be opened.

    Raises:
        LoopedError: the port is taken, or a package is missing.
    """
    need_server()
    import uvicorn

    with listening(port) as listener:
        serving = Serving(session, listener.getsockname()[1])
        listener.listen()
        if ready is not None:
            ready(serving.address)
        config = uvicorn.Config(serving.app(), log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            serving.closing.set()
