"""The explorer's page, served in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tl_looped import LoopedBridge
from tl_looped.explorer import Session
from tl_looped.explorer.server import Serving, listening

httpx = pytest.importorskip("httpx", reason="needs httpx, of the extra dev")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra explore")

PROMPT, OTHER = "A b B c C d D a ? A", "A c B d C b D a ? A"


@contextmanager
def served(model: LoopedBridge) -> Iterator[Serving]:
    with listening(0) as listener:
        listener.listen()
        serving = Serving(Session(model), listener.getsockname()[1])
        config = uvicorn.Config(serving.app(), log_level="error", lifespan="on", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield serving
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def hooked(page: Serving) -> list[str]:
    models = [page.session.model, *page.session._models.values()]
    return [name for model in models for name, point in model.hook_dict.items() if point.has_hooks()]
