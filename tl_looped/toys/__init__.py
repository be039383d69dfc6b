"""Small trained looped models that come with the package: `LoopedBridge.from_pretrained("toy:hop")`."""

from __future__ import annotations

from .hop import HopPrompts, hop_accuracy, hop_prompts

TOYS = {
    "hop": "pointer chasing, one hop per loop; 2 layers, 6 loops, injection",
    "hop-noinject": "the same without injection",
    "text": "English of the Python documentation; 1 + 3 x 4 + 1 layers, loss on the last output only",
    "text-feedforward": "the same text, 14 layers that are not looped: the depth and compute of text, 2.4 times its parameters",
}

__all__ = ["TOYS", "HopPrompts", "hop_accuracy", "hop_prompts"]
