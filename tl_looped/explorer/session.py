"""What the explorer asks of a model: a dict in, a dict out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import LoopedError
from ..kinds import choice, count, shown
from ..looped import Looped, check_model
from ..running import first_hooked
from ._asked import LENSES, SITES, Asked, listed, read_asked, read_prompt, token_id, words_of
from ._attention import head_in_all_loops
from ._edits import Call, Hooks, calls, edited, lacking, offered
from ._grids import MOST_ENTRIES, Said, read_grid
from ._page import frozen, frozen_part
from ._patches import patch_hooks, same_length, sweep
from ._progress import Cancelled, Progress
from ._script import script
from ._writing_on import policies, write_on

__all__ = ["Session"]

KEPT_MODELS, KEPT_GRIDS = 3, 4
PROMPTS = {
    "toy:hop": ("A b B c C d D a ? A", "A c B d C b D a ? A"),
    "toy:hop-noinject": ("A b B c C d D a ? A", "A c B d C b D a ? A"),
    "toy:text": ("Return the number of", "Return the name of"),
    "toy:text-feedforward": ("Return the number of", "Return the name of"),
}
ANY_TEXT = ("The capital of France is", "The capital of Italy is")


class Session:
    """Answers what the page asks of a model, one question at a time.

    It works on unrolls of its own: hooks of the model do not act here, and none is left on it, whatever happens.

    Args:
        model: the model.

    Raises:
        LoopedError: it is no looped model.

    Example:
        >>> from tl_looped import LoopedBridge
        >>> session = Session(LoopedBridge.from_pretrained("toy:hop", device="cpu"))
        >>> state = {"prompt": "A b B c C a ? A", "loops": 2, "lens": "readout"}
        >>> reply = session.answer({"ask": "grid", "state": state})
        >>> [row["where"] for row in reply["grid"]["rows"]]
        ['loop 0', 'loop 1']
    """

    most_entries: int = MOST_ENTRIES  # of the most probable tokens of a grid

    def __init__(self, model: Looped):
        check_model(model)
        if not isinstance(model, Looped):
            raise LoopedError(f"the explorer was asked of a {type(model).__name__}; it needs a LoopedBridge.")
        self.model: Looped = model
        self.made_for: int | None = model.made_for  # loops beyond it are marked
        self._lock: threading.Lock = threading.Lock()
        self._models: OrderedDict[int, Looped] = OrderedDict()
        self._grids: OrderedDict[Any, Said] = OrderedDict()
        self._questions: dict[str, Callable[[dict[str, Any], Progress], dict[str, Any]]] = {
            "describe": self._describe,
            "grid": self._grid,
            "sweep": self._sweep,
            "attention": self._attention,
            "generate": self._generate,
            "script": self._script,
            "token": self._token,
            "page": self._page,
        }

    def answer(
        self,
        message: object,
        progress: Callable[[float, str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Answer one message. What cannot be answered is a reply {"error": a sentence}; a cancelled one {"cancelled": True}.

        Args:
            message: {"ask": what, "state": what is shown, ...}; see `docs/explorer.md`.
            progress: is told how far the work is, from 0 to 1, and what is being done.
            cancelled: is asked after every layer and every part of a sweep whether to stop.
        """
        try:
            if not isinstance(message, dict):
                raise LoopedError(f"message={shown(message)} was given; a message is an object.")
            ask = choice(*self._questions)("ask", message.get("ask"))
            steps = Progress(progress, cancelled)
            while not self._lock.acquire(timeout=0.2):
                steps(0.0, "waiting for another tab")
            try:
                return self._questions[ask](message, steps)
            finally:
                self._lock.release()
        except Cancelled:
            return {"cancelled": True}
        except LoopedError as error:
            return {"error": str(error)}
        except (RuntimeError, MemoryError) as error:  # of torch: out of memory, above all
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no memory left'}"}

    def _at(self, n_loops: int) -> Looped:
        """The model with another number of loops, which has hooks of its own."""
        if n_loops not in self._models:
            if self.model.lacks("early readouts") is not None:
                if n_loops != self.model.n_loops:
                    raise LoopedError(
                        f"The weights of this model were processed (compatibility mode) and belong to {self.model.n_loops} "
                        "loops; load it without, to loop it otherwise."
                    )
                self._models[n_loops] = self.model
            else:
                self._models[n_loops] = self.model.unroll(n_loops)
        self._models.move_to_end(n_loops)
        while len(self._models) > KEPT_MODELS:
            self._models.popitem(last=False)
        return self._models[n_loops]

    def _describe(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What the model is, and what is offered."""
        model = self.model
        name = str(model.cfg.model_name)
        prompts = PROMPTS.get(name, ANY_TEXT) if model.tokenizer is not None else self._ids()
        lenses = {
            "native": "the family's own way out",
            "logit": "last norm and unembedding",
            "readout": "after every loop",
        }
        undecodable = lacking(model, "early readouts") or lacking(model, "every position")
        unread = lacking(model, "other depths")
        hooked = first_hooked(model)
        return {
            "name": name,
            "family": model.facts().family,
            "runs": model.schedule.describe(),
            "n_loops": model.n_loops,
            "made_for": self.made_for,
            "stacks": {s: n for s, n in model.schedule.stacks.items() if n},
            "core_stacks": list(model.schedule.core_stacks),
            "n_heads": model.cfg.n_heads,
            "n_ctx": model.cfg.n_ctx,
            "d_vocab": model.cfg.d_vocab,
            "has_tokenizer": model.tokenizer is not None,
            "prompts": list(prompts),
            "lenses": [
                {"lens": lens, "title": lenses[lens], "why": unread if lens == "readout" else undecodable} for lens in LENSES
            ],
            "sites": list(SITES),
            "edits": offered(model),
            "policies": policies(model),
            "note": f"The model has hooks, such as at {hooked}; they do not act here." if hooked else "",
        }

    def _ids(self) -> tuple[str, str]:
        """Two prompts of token ids."""
        d_vocab, n = self.model.cfg.d_vocab, min(6, self.model.cfg.n_ctx)
        ids = [(5 * i + 1) % d_vocab for i in range(n)]
        other = [*ids[: n // 2], (ids[n // 2] + 1) % d_vocab, *ids[n // 2 + 1 :]]
        return ", ".join(map(str, ids)), ", ".join(map(str, other))

    def _grid(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The grid without edits, and with them if there are any."""
        asked = read_asked(self.model, message.get("state"))
        model = self._at(asked.n_loops)
        made, repeats, others = self._edits(model, asked)
        has_edits = bool(made or repeats or others is not None)
        key = (tuple(asked.tokens[0].tolist()), asked.n_loops, asked.lens, asked.pins)
        if key not in self._grids:
            base = progress.part(0.0, 0.5 if has_edits else 1.0)
            self._grids[key] = read_grid(model, asked.tokens, asked.lens, asked.pins, [], base, self.most_entries)
        self._grids.move_to_end(key)
        while len(self._grids) > KEPT_GRIDS:
            self._grids.popitem(last=False)
        tokens: list[int] = asked.tokens[0].tolist()
        reply: dict[str, Any] = {
            "tokens": tokens,
            "words": words_of(model, [*tokens, *asked.pins]),
            "pins": list(asked.pins),
            "at": asked.at,
            "loops": asked.n_loops,
            "lens": asked.lens,
            "grid": self._grids[key].message(model, range(model.n_loops), model.schedule, self.made_for),
            "edited": None,
        }
        if has_edits:
            runs, hooks, loops = self._edited(model, asked, made, repeats, others)
            found = read_grid(runs, asked.tokens, asked.lens, asked.pins, hooks, progress.part(0.5, 1.0), self.most_entries)
            reply["edited"] = found.message(runs, loops, model.schedule, self.made_for)
        return reply

    def _edits(self, model: Looped, asked: Asked) -> tuple[list[Call], list[tuple[int, int]], Int[Tensor, "1 pos"] | None]:
        """The interventions as calls, the repeated loops, and the second prompt where activations of it are put in."""
        made, repeats = calls(model, asked.edits)
        if asked.patch is None:
            return made, repeats, None
        others = read_prompt(model, asked.raw.get("other", ""), which="The second prompt")
        same_length(model, asked.tokens, others)
        return made, repeats, others

    def _edited(
        self, model: Looped, asked: Asked, made: list[Call], repeats: list[tuple[int, int]], others: Tensor | None
    ) -> tuple[Looped, Hooks, list[int]]:
        """The model that runs with the edits, their hooks, and which loop each of its loops is."""
        patches: Hooks = []
        if others is not None and asked.patch is not None:
            patches = patch_hooks(model, others, asked.patch)
        return edited(model, made, repeats, patches)

    def _as_shown(self, message: dict[str, Any]) -> tuple[Looped, Hooks, Asked]:
        """What runs where the screen shows the edited run: the model, and the hooks."""
        asked = read_asked(self.model, message.get("state"))
        model = self._at(asked.n_loops)
        if message.get("unedited"):
            return model, [], asked
        runs, hooks, _ = self._edited(model, asked, *self._edits(model, asked))
        return runs, hooks, asked

    def _sweep(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Every cell patched by itself."""
        asked = read_asked(self.model, message.get("state"))
        model = self._at(asked.n_loops)
        if asked.edits:
            raise LoopedError("A sweep patches the run without interventions; switch them off first.")
        others = read_prompt(model, asked.raw.get("other", ""), which="The second prompt")
        same_length(model, asked.tokens, others)
        site = choice(*SITES)("site", message.get("site", "resid_pre"))
        head = count(least=0)("head", message.get("head", 0))
        answers: list[int] = []
        for name, tokens in (("answer", others), ("wrong", asked.tokens)):
            if (given := message.get(name)) not in (None, ""):
                answers.append(token_id(model, name, given))
            else:
                with torch.no_grad():
                    answers.append(int(model(tokens)[0, -1].argmax()))
        if answers[0] == answers[1]:
            raise LoopedError(
                "Both prompts have the same answer, so patches cannot move one towards the other; choose two tokens to compare."
            )
        return sweep(model, asked.tokens, others, site, head, (answers[0], answers[1]), progress)

    def _attention(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """One head in all loops."""
        model, hooks, asked = self._as_shown(message)
        known = [s for s, n in model.schedule.stacks.items() if n]
        stack = choice(*known)("stack", message.get("stack") or model.schedule.core_stacks[-1])
        layer, head = (count(least=0)(name, message.get(name, 0)) for name in ("layer", "head"))
        return head_in_all_loops(model, asked.tokens, stack, layer, head, asked.at, hooks, progress)

    def _generate(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """More text, with the loops that were spent."""
        model, hooks, asked = self._as_shown(message)
        return {"prompt": asked.tokens[0].tolist(), **write_on(model, asked.tokens, message, hooks, progress)}

    def _script(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The screen as Python."""
        asked = read_asked(self.model, message.get("state"))
        model = self._at(asked.n_loops)
        made, repeats, others = self._edits(model, asked)
        return {"script": script(model, asked, made, repeats, None if others is None else others[0].tolist())}

    def _token(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The ids and texts of tokens that were typed."""
        ids = [token_id(self.model, "token", one) for one in listed("tokens", message.get("tokens"), 16)]
        return {"tokens": ids, "words": words_of(self.model, ids)}

    def _page(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The grid as a page of its own, on which nothing more can be asked."""
        return {"html": frozen(str(self.model.cfg.model_name), self._frozen(message, progress))}

    def _frozen(self, message: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """All that a page without Python is given."""
        reply, state = self._grid(message, progress), dict(message["state"])
        if state.get("colour") == "sweep":
            state["colour"] = "prob"
        return {"describe": self._describe(message, progress), "grid": reply, "state": state}


def frozen_grid(
    model: Looped, state: dict[str, Any], *, made_for: int | None, most_entries: int, wrong: list[list[int]]
) -> str:
    """A grid as a part of any page of HTML that has the `drawing_parts`, which shows it without Python and a network.

    Args:
        model: the model.
        state: what is shown.
        made_for: how many loops it was made for; loops beyond are marked.
        most_entries: of the most probable tokens of all cells.
        wrong: the rows and positions of cells whose answer is known to be wrong.

    Returns:
        The HTML.

    Raises:
        LoopedError: the state does not fit the model.
    """
    session = Session(model)
    session.made_for, session.most_entries = made_for, most_entries
    return frozen_part({**session._frozen({"state": state}, Progress()), "wrong": wrong})
