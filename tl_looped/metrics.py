"""Metrics ready made: one number per row of a batch, from its own last token, with answers as text or ids.

A sweep binds such a metric to its run, so that text becomes token ids and padding is known. By itself a metric is an ordinary
function of logits, for `transformer_lens.patching` too: `logit_diff(5, 6)(logits)` is a number for one row and [batch] for
several (there `reduce="mean"`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._precision import wide
from .errors import LoopedError
from .kinds import plain, shown
from .schedule import Indices
from .tokens import Mask, real_positions

if TYPE_CHECKING:
    from .looped import Looped

__all__ = ["Answers", "RowMetric", "kl_to", "logit", "logit_diff", "prob"]

# One answer for every row, or one per row; as text that is one token, or as a token id. [batch, chosen]: one per position.
Answers = str | int | Sequence[str | int] | Int[Tensor, "*batch chosen"]
AnyMetric = TypeVar("AnyMetric", bound="RowMetric")


@dataclass(frozen=True, eq=False)
class RowMetric(ABC):
    """A metric of this module: from logits to one number per row.

    Args:
        name: what its numbers are, with their unit if they have one.
        positions: where it reads; the mean of several. -1 is each row's own last token.
        mask: which positions are real, [batch, pos]; None where all are.
    """

    name: str
    positions: Indices
    mask: Mask

    @abstractmethod
    def bind(self: AnyMetric, model: Looped, attention_mask: Mask = None) -> AnyMetric:
        """The metric for one run: text read by the tokenizer of the model, and padding left out.

        Sweeps do this. By hand it is for padded batches, and for tools that know a metric as a function of logits alone.

        Args:
            model: the model.
            attention_mask: 1 for real tokens, [batch, pos]; None where all are.

        Raises:
            LoopedError: an answer that is not one token, or outside the vocabulary.
        """

    @abstractmethod
    def rows(self: AnyMetric, rows: Sequence[int]) -> AnyMetric:
        """The metric for some of the rows, as a batch of them needs it.

        Args:
            rows: which.
        """

    @abstractmethod
    def _score(self, logits: Float[Tensor, "batch chosen d_vocab"]) -> Float[Tensor, "batch chosen"]:
        """The metric at every chosen position."""

    @property
    @abstractmethod
    def n_rows(self) -> int | None:
        """How many rows it has an answer for; None for any number."""

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "*batch"]:
        """The metric of every row, [batch]; of a single row, a number.

        Args:
            logits: of a run, [batch, pos, d_vocab].

        Raises:
            LoopedError: answers that are still text, or not one per row; logits of other positions than the mask.
        """
        if self.n_rows not in (None, len(logits)):
            raise LoopedError(
                f"{self.n_rows} answers were given for {len(logits)} rows; pass one for each row, in their order, or a single "
                "one for all."
            )
        if self.mask is not None and self.mask.shape != logits.shape[:2]:
            raise LoopedError(
                f"the metric is bound to a run of {tuple(self.mask.shape)} (rows, positions), but was given logits of "
                f"{tuple(logits.shape[:2])}; bind it to this run."
            )
        scores = self._score(_at(logits, self.positions, self.mask))
        if self.positions is None and self.mask is not None:
            real = self.mask.to(scores.device, scores.dtype)
            scores = (scores * real).sum(1) / real.sum(1)
        else:
            scores = scores.mean(1)
        return scores[0] if len(scores) == 1 else scores


@dataclass(frozen=True, eq=False)
class AnswerMetric(RowMetric):
    """A metric of the logits of answers.

    Args:
        answers: the answers as they were given, and the wrong ones, if the metric has any.
        function: from logits [batch, chosen, d_vocab] and the ids of each [batch, chosen] to the metric.
    """

    answers: tuple[Any, ...]
    function: Callable[..., Tensor]

    @property
    def n_rows(self) -> int | None:
        return next((len(answer) for answer in self.answers if not isinstance(answer, (str, int))), None)

    def bind(self, model: Looped, attention_mask: Mask = None) -> AnswerMetric:
        ids = tuple(_ids(model, answer) for answer in self.answers)
        return replace(self, answers=ids, mask=self.mask if attention_mask is None else attention_mask)

    def rows(self, rows: Sequence[int]) -> AnswerMetric:
        def chosen(answer: Any) -> Any:
            if isinstance(answer, (str, int)):
                return answer
            return answer[list(rows)] if isinstance(answer, Tensor) else [answer[i] for i in rows]

        mask = None if self.mask is None else self.mask[list(rows)]
        return replace(self, answers=tuple(map(chosen, self.answers)), mask=mask)

    def _score(self, logits: Float[Tensor, "batch chosen d_vocab"]) -> Float[Tensor, "batch chosen"]:
        ids = []
        for answer in self.answers:
            if isinstance(answer, str) or (not isinstance(answer, (int, Tensor)) and any(isinstance(a, str) for a in answer)):
                raise LoopedError(
                    f"the metric {self.name} has the answer {shown(answer)} as text, but no tokenizer; call "
                    "metric.bind(model) before you use it outside the sweeps of tl_looped, or pass token ids."
                )
            id = torch.as_tensor(answer, device=logits.device)
            _check_ids(id, logits.shape[-1])
            id = id[:, None] if id.ndim == 1 else id
            if id.ndim == 2 and id.shape[1] not in (1, logits.shape[1]):
                raise LoopedError(
                    f"answers of shape {tuple(id.shape)} were given, but the metric reads {logits.shape[1]} positions of every "
                    "row; pass one answer per row, or [rows, positions] and positions= that name as many."
                )
            ids.append(id.expand(logits.shape[:2]))
        return self.function(logits, *ids)


@dataclass(frozen=True, eq=False)
class Divergence(RowMetric):
    """The KL divergence from the predictions of a clean run.

    Args:
        clean: logits of that run, [batch, pos, d_vocab], or its prompts.
        chosen: its log-probabilities at the chosen positions, [batch, chosen, d_vocab], once they are read.
    """

    clean: Any
    chosen: Tensor | None = None

    @property
    def has_logits(self) -> bool:
        """Whether the clean run is known by its logits, not by its prompts."""
        return _is_logits(self.clean)

    @property
    def n_rows(self) -> int | None:
        one = isinstance(self.clean, str) or (_is_ids(self.clean) and self.clean.ndim == 1)
        return 1 if one else len(self.clean)

    def bind(self, model: Looped, attention_mask: Mask = None) -> Divergence:
        mask = self.mask if attention_mask is None else attention_mask
        if self.chosen is not None:
            return replace(self, mask=mask)
        logits, own = self.clean, mask
        if not self.has_logits:
            if model.starts_from == "noise":
                raise LoopedError(
                    "kl_to(prompts) was asked of a model whose runs start from noise; pass the "
                    "logits of the clean run, which then starts as you choose (initial_state=)."
                )
            clean, own = model.read(self.clean, None, None, None)
            with torch.no_grad():
                logits = model(clean, attention_mask=own)
        return replace(self, mask=mask, chosen=_log_probs(_at(logits, self.positions, own)).detach())

    def rows(self, rows: Sequence[int]) -> Divergence:
        if self.n_rows == 1 and isinstance(self.clean, str):
            return self
        clean = self.clean[list(rows)] if isinstance(self.clean, Tensor) else [self.clean[i] for i in rows]
        chosen, mask = (None if t is None else t[list(rows)] for t in (self.chosen, self.mask))
        return replace(self, clean=clean, chosen=chosen, mask=mask)

    def _score(self, logits: Float[Tensor, "batch chosen d_vocab"]) -> Float[Tensor, "batch chosen"]:
        clean = self.chosen
        if clean is None:
            if not self.has_logits:
                raise LoopedError(
                    "kl_to(prompts) knows no model yet; call metric.bind(model) before you use it outside the sweeps of "
                    "tl_looped, or pass the logits of the clean run."
                )
            clean = _log_probs(_at(self.clean, self.positions, self.mask))
        clean = clean.to(logits.device)
        if clean.shape != logits.shape:
            raise LoopedError(
                f"the clean run has {tuple(clean.shape)} (rows, chosen positions, vocabulary), this one {tuple(logits.shape)}; "
                "give both equally many rows and positions."
            )
        return (clean.exp() * (clean - _log_probs(logits))).sum(-1)


def logit_diff(right: Answers, wrong: Answers, *, positions: Indices = -1) -> RowMetric:
    """The logit of the right answer minus that of the wrong one.

    Args:
        right: text that is one token or a token id, for all rows; or a list or tensor of these, one per row. A tensor
            [batch, chosen] has one for every position that is read.
        wrong: as `right`.
        positions: where to read; the mean of several. -1 is each row's own last token, whichever side is padded.

    Raises:
        LoopedError: something that is no answer; when a run binds the metric, text that is not one token.

    Example:
        >>> from tl_looped import LoopedBridge
        >>> from tl_looped.metrics import logit_diff
        >>> from tl_looped.patching import patch_sweep
        >>> model = LoopedBridge.from_pretrained("toy:hop", device="cpu")
        >>> _, clean_cache = model.run_with_cache("A b B c C a ? A")
        >>> sweep = patch_sweep(model, "A c B a C b ? A", clean_cache, logit_diff("a", "b"), verbose=False)
        >>> sweep.name, sweep.axes
        ('logit difference', ('loop', 'layer', 'pos'))
        >>> logit_diff(3, 4)(torch.arange(5.0).expand(1, 2, 5))  # as a plain function, with ids
        tensor(-1.)
    """
    return _answer_metric("logit difference", (right, wrong), lambda x, a, b: _pick(x, a) - _pick(x, b), positions)


def logit(answer: Answers, *, positions: Indices = -1) -> RowMetric:
    """The logit of an answer.

    Args:
        answer: as in `logit_diff`.
        positions: as in `logit_diff`.

    Raises:
        LoopedError: as in `logit_diff`.

    Example:
        >>> logit([3, 4])(torch.arange(5.0).expand(2, 1, 5))
        tensor([3., 4.])
    """
    return _answer_metric("logit", (answer,), _pick, positions)


def prob(answer: Answers, *, positions: Indices = -1) -> RowMetric:
    """The probability of an answer.

    Args:
        answer: as in `logit_diff`.
        positions: as in `logit_diff`.

    Raises:
        LoopedError: as in `logit_diff`.

    Example:
        >>> prob(3)(torch.zeros(1, 1, 4))
        tensor(0.2500)
    """
    return _answer_metric("probability", (answer,), lambda x, a: _pick(_log_probs(x), a).exp(), positions)


def kl_to(clean: Any, *, positions: Indices = -1) -> RowMetric:
    """KL(clean || run), in nats: how far the predictions of a run are from those of a clean run.

    Args:
        clean: logits of the clean run, [batch, pos, d_vocab]; or its prompts (text, texts or tokens), which the model then
            runs, as deep as the sweep does.
        positions: where to read, in both runs; the mean of several. -1 is each row's own last token; None for all real ones.

    Raises:
        LoopedError: neither logits nor prompts; when a run binds the metric, another number of rows or positions; prompts for
            a model whose runs start from noise.

    Example:
        >>> kl_to(torch.zeros(1, 1, 4))(torch.zeros(1, 1, 4))
        tensor(0.)
    """
    if not isinstance(clean, (str, Tensor)) and not (isinstance(clean, (list, tuple)) and clean):
        raise LoopedError(f"kl_to({shown(clean)}) was asked; pass the logits of the clean run, or its prompts.")
    if isinstance(clean, Tensor) and (clean.is_floating_point() != (clean.ndim == 3) or not 1 <= clean.ndim <= 3):
        raise LoopedError(
            f"kl_to() was given a {clean.dtype} tensor of shape {tuple(clean.shape)}; pass logits [batch, pos, d_vocab] or "
            "token ids."
        )
    clean = clean.detach() if isinstance(clean, Tensor) else clean
    return Divergence("KL divergence (nats)", positions, None, clean)


def bound(metric: Any, model: Looped, attention_mask: Mask) -> Any:
    """A metric for one run; functions of the user's own as they are.

    Args:
        metric: the metric.
        model: of the run.
        attention_mask: of the run.
    """
    if not callable(metric):
        raise LoopedError(
            f"metric={shown(metric)} was given; pass a function of logits [batch, pos, d_vocab], such as "
            "tl_looped.metrics.logit_diff(right, wrong)."
        )
    return metric.bind(model, attention_mask) if isinstance(metric, RowMetric) else metric


def metric_name(metric: Any) -> str:
    """What the numbers of a metric are called.

    Args:
        metric: the metric.
    """
    return metric.name if isinstance(metric, RowMetric) else "metric"


def one_token(model: Looped, answer: str | int) -> int:
    """The id of an answer that is one token.

    Args:
        model: whose tokenizer reads it.
        answer: the text, or the id.

    Raises:
        LoopedError: it is none or several tokens, and the message has what it is read as and a near spelling that is one; an
            id outside the vocabulary; text without a tokenizer.
    """
    if isinstance(answer, int):
        _check_ids(answer, model.cfg.d_vocab)
        return answer
    if model.tokenizer is None:
        raise LoopedError(f"{answer!r} was given, but this model has no tokenizer; pass the number of the token.")
    ids = _encoded(model, answer)
    if len(ids) == 1:
        return ids[0]
    words = [model.tokenizer.decode([i]) for i in ids]
    near = [s for s in dict.fromkeys((f" {answer.strip()}", answer.strip(), *words[:1])) if s and s != answer]
    single = next((spelling for spelling in near if len(_try_encoded(model, spelling)) == 1), None)
    remedy = f"pass one token, such as {single!r}" if single else "pass one token, or its id"
    raise LoopedError(f"the answer {answer!r} is {len(ids)} tokens, {', '.join(map(repr, words))}; {remedy}.")


def _encoded(model: Looped, text: str) -> list[int]:
    return model.read(text, prepend_bos=False)[0].flatten().tolist() if text else []


def _try_encoded(model: Looped, text: str) -> list[int]:
    try:
        return _encoded(model, text)
    except LoopedError:  # the tokenizer has no token for a part of it
        return []


def _answer_metric(name: str, answers: tuple[Any, ...], function: Callable[..., Tensor], positions: Indices) -> AnswerMetric:
    answers = tuple(map(_answer, answers))
    lengths = [len(answer) for answer in answers if not isinstance(answer, (str, int))]
    if len(set(lengths)) > 1:
        raise LoopedError(f"{lengths[0]} right and {lengths[1]} wrong answers were given; pass one of each for every row.")
    return AnswerMetric(name, positions, None, answers, function)


def _answer(asked: Any) -> Any:
    """An answer for all rows as a str or an int; one per row as a list or a tensor of ids."""
    if isinstance(asked, Tensor):
        if asked.is_floating_point() or asked.dtype == torch.bool or asked.ndim > 2 or not asked.numel():
            raise LoopedError(
                f"answers of shape {tuple(asked.shape)} in {asked.dtype} were given; pass token ids, [batch] or "
                "[batch, position]."
            )
        return int(asked) if not asked.ndim else asked.detach().long()
    asked = plain(asked)
    if isinstance(asked, (list, tuple)) and asked and all(_is_one(answer) for answer in asked):
        return list(asked)
    if not _is_one(asked):
        raise LoopedError(
            f"the answer {shown(asked)} was given; pass text that is one token or a token id, or a list of these, one per row."
        )
    return asked


def _is_one(answer: object) -> bool:
    return isinstance(answer, (str, int)) and not isinstance(answer, bool)


def _ids(model: Looped, answer: Any) -> Any:
    if isinstance(answer, (str, int)):
        return one_token(model, answer)
    if isinstance(answer, Tensor):
        _check_ids(answer, model.cfg.d_vocab)
        return answer
    return torch.tensor([one_token(model, one) for one in answer], device="cpu")


def _check_ids(ids: Any, d_vocab: int) -> None:
    low, high = (int(ids.min()), int(ids.max())) if isinstance(ids, Tensor) else (ids, ids)
    if low < 0 or high >= d_vocab:
        raise LoopedError(
            f"the answer {low if low < 0 else high} was given, but the vocabulary of this model is 0..{d_vocab - 1}."
        )


def _at(logits: Float[Tensor, "batch pos d_vocab"], positions: Indices, mask: Mask) -> Float[Tensor, "batch chosen d_vocab"]:
    """The logits at the chosen positions of every row."""
    columns = real_positions(positions, mask, logits.shape[1]).to(logits.device)
    if len(columns) == 1:
        return logits[:, columns[0]]
    return logits[torch.arange(len(logits), device=logits.device)[:, None], columns]


def _pick(x: Float[Tensor, "batch chosen d_vocab"], ids: Int[Tensor, "batch chosen"]) -> Float[Tensor, "batch chosen"]:
    return wide(x.gather(-1, ids[..., None])[..., 0])


def _log_probs(logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
    return wide(logits).log_softmax(-1)


def _is_logits(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_ids(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()
