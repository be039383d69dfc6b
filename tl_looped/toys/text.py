"""English to train on, wherever Python runs: what `help()` shows.

The text is the Python documentation that the interpreter itself carries: `pydoc_data.topics` and the docstrings of the standard
library. Copyright Python Software Foundation; licensed under the PSF License Version 2, https://docs.python.org/3/license.html.
It changes a little with Python's version; the bundled checkpoints were trained with that of Python 3.11.7.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from ..bridge.looped_bridge import LoopedBridge
from ..model import LoopedModel
from ..model.looped_model import initialise

BOS = "<s>"
WINDOW = 128  # tokens, the first of which is BOS
TEXT_STD = 0.06  # of the matrices before the first step of training
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
_ELSEWHERE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "distutils"}


def corpus(held_out: bool = False) -> str:
    """The training text, or the held-out one: whole documents, about one in twenty.

    The documents are the topics of `help()` and, for every module of the standard library, which is parsed and not run, its
    docstrings.

    Args:
        held_out: which of the two.
    """

    def is_wanted(document: str) -> bool:
        return (zlib.crc32(document.encode()) % 20 == 0) == held_out

    texts = {name: text.strip() for topic, text in topics.items() if is_wanted(name := f"topic {topic}")}
    library = Path(sysconfig.get_path("stdlib"))
    for file in library.rglob("*.py"):
        path = file.relative_to(library)
        if is_wanted(name := f"module {path.as_posix()}") and _ELSEWHERE.isdisjoint(path.parts):
            nodes = [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, _DOCUMENTED)]
            if docstrings := [text for node in nodes if (text := ast.get_docstring(node))]:
                texts[name] = "\n\n".join(docstrings)
    return "\n\n".join(text for _, text in sorted(texts.items()))


def text_tokenizer(text: str, n_words: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding learned on a text; every string can be encoded.

    Args:
        text: what to learn on.
        n_words: size of the vocabulary: BOS, the 256 bytes, and merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_words, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def encode(tokenizer: Any, text: str) -> Int[Tensor, " pos"]:
    """Tokens of a long text, without BOS."""
    pieces = tokenizer(text.split("\n\n"), add_special_tokens=False)["input_ids"]
    gap = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return torch.tensor([token for piece in pieces for token in (*piece, *gap)], device="cpu")


def windows(tokens: Int[Tensor, " pos"], starts: Int[Tensor, " batch"]) -> Int[Tensor, "batch window"]:
    """BOS and the tokens that follow each start, `WINDOW` in total."""
    found = tokens[starts[:, None] + torch.arange(-1, WINDOW - 1, device=tokens.device)]
    found[:, 0] = 0
    return found


def held_out_windows(model: LoopedBridge, step: int = 1) -> Int[Tensor, "batch window"]:
    """The held-out text, cut into windows that do not overlap.

    Args:
        model: a toy of text, for its tokenizer.
        step: keep every so many.
    """
    tokens = encode(model.tokenizer, corpus(held_out=True))
    return windows(tokens, torch.arange(1, len(tokens) - WINDOW, WINDOW * step, device=tokens.device))


def untrained(model: LoopedBridge, seed: int) -> LoopedBridge:
    """A model of the same structure, as training begins.

    Args:
        model: a toy of text.
        seed: of the initialisation.
    """
    return LoopedBridge(initialise(LoopedModel(model.looped_cfg), seed, std=TEXT_STD), model.tokenizer, "toy")


@torch.no_grad()
def loss_by_loop(model: LoopedBridge, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "loop batch"]:
    """Mean cross-entropy in nats per token of what the model would answer after each of its loops.

    Args:
        model: any looped model.
        tokens: texts of one length, each beginning with BOS.
    """

    def loss(loop: int, logits: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(-1)

    return torch.stack(model.readouts(tokens, loss))
