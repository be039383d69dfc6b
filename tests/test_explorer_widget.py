"""The explorer in a notebook: its messages without a kernel, and in a real one."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from tl_looped import LoopedBridge, LoopedError, explore
from tl_looped.explorer import Session

pytest.importorskip("anywidget", reason="needs anywidget, of the extra explore")
PROMPT = "A b B c C d D a ? A"
GRID = {"ask": "grid", "state": {"prompt": PROMPT, "loops": 2}}


@pytest.fixture(scope="module")
def toy() -> LoopedBridge:
    return LoopedBridge.from_pretrained("toy:hop", device="cpu")


class Heard:
    """A widget, and what it sends."""

    def __init__(self, model: LoopedBridge, **more: Any):
        self.widget = explore(model, **more)
        self.said: list[Any] = []
        self.widget.send = self.said.append

    def tell(self, content: Any) -> None:
        self.widget._heard(self.widget, content, [])

    def reply(self, task: str) -> Any:
        for _ in range(400):
            if found := [said["reply"] for said in self.said if said["id"] == task and "reply" in said]:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(self.said)


@pytest.mark.filterwarnings("ignore")  # of a widget without a kernel
def test_a_question_is_answered_as_by_the_session(toy: LoopedBridge) -> None:
    heard = Heard(toy, prompt=PROMPT)
    heard.tell({"id": "a", "message": GRID})
    assert heard.reply("a") == Session(toy).answer(GRID)
    heard.tell({"id": "b", "message": {"ask": "grid", "state": {}}})
    assert heard.reply("b") == {"error": "The prompt is empty; type one."}
    assert heard.widget.state == {"prompt": PROMPT, "tokens": None} and heard.widget.tasks == {}
    assert explore(toy, state={"loops": 3}).state == {"loops": 3}


@pytest.mark.filterwarnings("ignore")
def test_stop_is_heard_while_a_question_is_answered(toy: LoopedBridge) -> None:
    heard = Heard(toy)
    with heard.widget.session._lock:  # it has to wait its turn
        heard.tell({"id": "a", "message": GRID})
        while not heard.said:
            time.sleep(0.01)
        heard.tell({"id": "a", "cancel": True})
        assert heard.reply("a") == {"cancelled": True}
    heard.tell({"id": "gone", "cancel": True})


def test_without_the_package_an_error_says_what_to_install(toy: LoopedBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_looped.explorer import server, widget

    widget._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(LoopedError, match=r"needs anywidget.*pip install 'tl-looped\[explore\]'"):
        explore(toy)
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(LoopedError, match=r"needs starlette.*pip install 'tl-looped\[explore\]'"):
        server.need_server()


@pytest.mark.slow
def test_in_a_kernel_it_answers_and_comes_back_after_a_restart() -> None:
    jupyter_client = pytest.importorskip("jupyter_client", reason="needs jupyter_client, of the extra dev")
    code = "from tl_looped import LoopedBridge, explore\nmodel = LoopedBridge.from_pretrained('toy:hop', device='cpu')\n"
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3", startup_timeout=120)

    def opened(state: str) -> str:
        """The comm of a widget that a cell makes."""
        client.execute(f"{code}widget = explore(model, state={state})\nwidget")
        comm = None
        while True:
            message = client.get_iopub_msg(timeout=120)
            content = message["content"]
            assert message["msg_type"] != "error", content
            if message["msg_type"] == "comm_open" and "_esm" in content["data"].get("state", {}):
                comm, held = content["comm_id"], content["data"]["state"]
                assert "export default" in held["_esm"] and ".tlx" in held["_css"] and held["name"] == "toy:hop"
            if message["msg_type"] == "status" and content["execution_state"] == "idle" and comm:
                return comm

    def tell(comm: str, data: dict[str, Any]) -> None:
        client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": comm, "data": data}))

    try:
        for _ in range(2):
            comm = opened("{'loops': 2}")
            tell(comm, {"method": "custom", "content": {"id": "a", "message": GRID}})
            reply = None
            while reply is None:
                message = client.get_iopub_msg(timeout=120)
                if message["msg_type"] == "comm_msg" and message["content"]["data"]["method"] == "custom":
                    reply = message["content"]["data"]["content"].get("reply")
            assert [row["where"] for row in reply["grid"]["rows"]] == ["prelude", *["loop 0"] * 2, *["loop 1"] * 2]
            tell(comm, {"method": "update", "state": {"state": {"loops": 5}}, "buffer_paths": []})
            client.execute("assert widget.state == {'loops': 5}", reply=True, timeout=60, store_history=False)
            manager.restart_kernel()
            client.wait_for_ready(timeout=120)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
