"""Who may ask the explorer's page, what ends its work, and the command that serves it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import PROMPT, hooked, httpx, served

from tl_looped import LoopedBridge, LoopedError
from tl_looped.explorer.server import LONGEST, Serving, listening


@pytest.fixture(scope="module")
def page() -> Iterator[Serving]:
    with served(LoopedBridge.from_pretrained("toy:hop", device="cpu")) as serving:
        yield serving


def ask(page: Serving, message: Any = None, *, token: str | None = None, body: bytes | None = None, **headers: str) -> Any:
    given = {"x-explorer-token": page.token if token is None else token, **headers}
    content = json.dumps(message).encode() if body is None else body
    return httpx.post(f"http://127.0.0.1:{page.port}/ask", content=content, headers=given, timeout=30)


GRID = {"ask": "grid", "state": {"prompt": PROMPT, "edits": [{"kind": "skip_loop", "loops": "1"}]}}


def test_only_the_page_itself_is_answered(page: Serving) -> None:
    here = f"127.0.0.1:{page.port}"
    good = ask(page, GRID, origin=f"http://{here}")
    assert good.status_code == 200 and "grid" in json.loads(good.text.splitlines()[-1])["reply"]
    before = dict(page.session._grids)
    refused: list[tuple[int, Any]] = [
        (403, ask(page, GRID, token="")),
        (403, ask(page, GRID, token=page.token[:-1])),
        (403, ask(page, GRID, token="x" * 5000)),
        (403, ask(page, GRID, origin="http://example.org")),
        (403, ask(page, GRID, origin="null")),
        (403, ask(page, GRID, host="example.org")),
        (403, ask(page, GRID, host=f"example.org:{page.port}")),
        (400, ask(page, body=b"{")),
        (400, ask(page, body=b"\xff\xfe")),
        (400, ask(page, body=b"[" * 200_000)),
        (400, ask(page, body=b" " * (LONGEST + 1))),
        (405, httpx.get(f"http://{here}/ask")),
        (404, httpx.get(f"http://{here}/explorer.js")),
        (403, httpx.get(f"http://{here}/")),
        (403, httpx.get(f"http://{here}/?token={page.token}x")),
        (403, httpx.get(f"http://{here}/?token={page.token}", headers={"host": "example.org"})),
    ]
    assert [reply.status_code for _, reply in refused] == [status for status, _ in refused]
    assert not any("grid" in reply.text for _, reply in refused) and dict(page.session._grids) == before
    opened = httpx.get(page.address)
    assert opened.status_code == 200 and "default-src 'none'" in opened.headers["content-security-policy"]
    assert set(re.findall(r"https?://[^\s\"'`)]*", opened.text)) == {"http://www.w3.org/2000/svg"}


def test_a_closed_tab_ends_its_work_and_leaves_no_hook(page: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(x: Any, hook: Any) -> None:
        time.sleep(0.03)

    many = Serving.__dict__["_work"]
    ended: list[dict[str, Any]] = []

    def work(self: Serving, message: Any, gone: threading.Event, tell: Callable[..., Any]) -> None:
        with self.session._at(60).hooks(fwd_hooks=[("blocks.*.hook_resid_post", endless)]):
            many(self, message, gone, lambda line: (ended.append(line) if "reply" in line else None, tell(line)))

    monkeypatch.setattr(Serving, "_work", work)
    state = {"prompt": PROMPT, "loops": 60, "lens": "readout"}
    with httpx.Client(timeout=60) as tab:
        headers = {"x-explorer-token": page.token}
        url = f"http://127.0.0.1:{page.port}/ask"
        with tab.stream("POST", url, json={"ask": "grid", "state": state}, headers=headers) as reply:
            assert "share" in json.loads(next(reply.iter_lines()))
    for _ in range(400):
        if ended:
            break
        time.sleep(0.05)
    assert ended == [{"reply": {"cancelled": True}}]
    page.session._models.clear()
    monkeypatch.undo()
    assert ask(page, GRID).status_code == 200 and hooked(page) == []


def test_what_fails_is_said_and_the_page_goes_on(page: Serving, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setitem(page.session._questions, "token", lambda message, progress: 1 / 0)
    reply = json.loads(ask(page, {"ask": "token"}).text)["reply"]
    assert "a mistake in tl_looped: ZeroDivisionError" in reply["error"] and "Traceback" in capfd.readouterr().err
    assert json.loads(ask(page, {"ask": "grid", "state": {"prompt": ""}}).text)["reply"] == {
        "error": "The prompt is empty; type one."
    }


def test_a_port_that_is_taken_is_refused_in_a_sentence(page: Serving) -> None:
    with pytest.raises(LoopedError, match="cannot be used"), listening(page.port) as listener:
        listener.listen()
    with pytest.raises(LoopedError, match="port=70000"):
        listening(70_000)


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c() -> None:
    command = [sys.executable, "-m", "tl_looped", "explore", "toy:hop", "--no-browser", "--prompt", PROMPT]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    address = running.stdout.readline().strip()
    opened = httpx.get(address.partition("#")[0])
    assert opened.status_code == 200 and "A%20b%20B" in address
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130 and said == "tl-looped: interrupted\n"
    failed = subprocess.run([*command[:-1], "A zebra"], capture_output=True, text=True)
    assert failed.returncode == 1 and "zebra" in failed.stderr and failed.stderr.count("\n") == 1
