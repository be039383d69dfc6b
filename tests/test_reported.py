"""Faults that were reported: one test a kind, with the number that is right and how it was had."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import ZOO, random_bridge, random_tokens
from tl_looped import LoopedBridge, LoopedConfig, LoopedError
from tl_looped.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"

# --- Machines: rows, kernels and training runs ---


# (end: Machines: rows, kernels and training runs)


# --- Copies, interruptions, frozen parameters, stale caches ---


# (end: Copies, interruptions, frozen parameters, stale caches)


# --- Padding and tokenizers ---


# (end: Padding and tokenizers)


# --- Configs: keys, kinds, counts ---


# (end: Configs: keys, kinds, counts)


# --- Files: saving, reading, writing ---


# (end: Files: saving, reading, writing)


# --- Paths, receivers and attribution ---


# (end: Paths, receivers and attribution)


# --- TransformerLens's names and tools ---


# (end: TransformerLens's names and tools)


# --- Exit policies, noise, figures ---


# (end: Exit policies, noise, figures)
