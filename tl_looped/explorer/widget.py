"""The explorer in a notebook."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import LoopedError
from ._page import HERE
from .session import Session

if TYPE_CHECKING:
    from ..looped import Looped


def explore(model: Looped, prompt: str | None = None, *, state: dict[str, Any] | None = None) -> Any:
    """A widget that shows what a model would say after every layer of every loop, and lets one change what it does.

    `widget.state` is what it shows; `explore(model, state=...)` shows it again. Without a state, a notebook that is run again
    shows what it showed. The numbers are those of `logit_lens`, `patch_sweep`, `interventions` and `generate`; "Copy as Python"
    gives the calls. Hooks of the model do not act here, and none is left on it.

    Args:
        model: the model.
        prompt: the first prompt; where the model has no tokenizer, token ids such as "5, 17, 3".
        state: what to show, from `widget.state` or the address of `tl-looped explore`.

    Raises:
        LoopedError: anywidget is not installed; no looped model.
    """
    session = Session(model)
    shown = dict(state or {}) | ({} if prompt is None else {"prompt": prompt, "tokens": None})
    return _widget_class()(session, name=str(model.cfg.model_name), state=shown)


@lru_cache
def _widget_class() -> Any:
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise LoopedError(
            f"the explorer's widget needs {error.name}, which is not installed; run `pip install 'tl-looped[explore]'`."
        ) from None

    class Explorer(anywidget.AnyWidget):
        """The widget; questions are answered in threads, so that "stop" is heard while one is."""

        _esm = HERE / "explorer.js"
        _css = HERE / "explorer.css"
        name = traitlets.Unicode("").tag(sync=True)
        state = traitlets.Dict().tag(sync=True)

        def __init__(self, session: Session, **more: Any):
            super().__init__(**more)
            self.session: Session = session
            self.tasks: dict[str, threading.Event] = {}
            self.on_msg(self._heard)

        def _heard(self, widget: Any, content: Any, buffers: Any) -> None:
            task = str(content.get("id"))
            if content.get("cancel"):
                if task in self.tasks:
                    self.tasks[task].set()
                return
            self.tasks[task] = threading.Event()
            threading.Thread(target=self._work, args=(task, content.get("message")), daemon=True).start()

        def _work(self, task: str, message: Any) -> None:
            gone = self.tasks[task]

            def progress(share: float, what: str) -> None:
                self.send({"id": task, "share": share, "what": what})

            try:
                reply = self.session.answer(message, progress, gone.is_set)
            except Exception as error:  # a mistake of the package: the widget says so, and goes on
                reply = {"error": f"This failed, which is a mistake in tl_looped: {type(error).__name__}: {error}"}
            finally:
                self.tasks.pop(task, None)
            self.send({"id": task, "reply": reply})

    return Explorer
