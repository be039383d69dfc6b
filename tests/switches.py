"""What tests of the bridge do with it: an edit, and the switches of its optional hook points."""

from __future__ import annotations

import warnings

import torch

from tl_looped import LoopedBridge

SWITCHES = ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in")


def edit(tensor: torch.Tensor, hook: object) -> torch.Tensor:
    return tensor * 1.5 + 0.1


def switch_on(bridge: LoopedBridge, *switches: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "set_use_split_qkv_input")  # edges of others are no matter here
        for switch in switches:
            getattr(bridge, f"set_use_{switch}")(True)
