"""The state before the first pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LoopedError
from ..record import InitialState
from .config import LoopedConfig

DEFAULT_SEED = 0


class NoiseTable:
    """Normal states in fp32, one row per position, that depend on nothing but the seed and the position.

    Published Huginn-like models draw a fresh state in every forward. Here position `p` always starts from the same row, so two
    calls start from the same bits, and so do a cached run and a full one, a padded row and the row alone.
    """

    def __init__(self, cfg: LoopedConfig):
        self.cfg = cfg
        self.rows: dict[int, Tensor] = {}

    def __call__(self, seed: int, position_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        needed = int(position_ids.max()) + 1
        rows = self.rows.get(seed)
        if rows is None or len(rows) < needed:
            known = [] if rows is None else [rows]
            new = [self._draw(seed, position) for position in range(0 if rows is None else len(rows), needed)]
            self.rows[seed] = rows = torch.cat([*known, torch.stack(new)])
        return rows[position_ids.cpu()].to(position_ids.device)

    def _draw(self, seed: int, position: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + position) % 2**63)
        return random_normal(torch.empty(self.cfg.d_model, dtype=torch.float32, device="cpu"), self.cfg, generator)


def random_normal(out: Tensor, cfg: LoopedConfig, generator: torch.Generator) -> Tensor:
    """Fill `out` from a normal of std `cfg.noise_std`, cut at 3 std if `cfg.noise` says so; scale it by `cfg.noise_scale`."""
    std = cfg.noise_std
    if cfg.noise == "normal":
        return out.normal_(generator=generator) * std * cfg.noise_scale
    return torch.nn.init.trunc_normal_(out, std=std, a=-3 * std, b=3 * std, generator=generator) * cfg.noise_scale


def initial_state(
    asked: InitialState,
    default: Float[Tensor, "batch pos d_model"] | None,
    like: Float[Tensor, "batch pos d_model"],
    position_ids: Int[Tensor, "batch pos"],
    noise: NoiseTable,
) -> Float[Tensor, "batch pos d_model"]:
    """The state entering the first pass.

    Args:
        asked: a tensor [batch, pos, d_model]; "zero"; for random-state families an int seed, or a generator that is advanced
            as the published code advances torch's global one (so `torch.Generator().manual_seed(k)` gives that code's state
            after `torch.manual_seed(k)`); None for the default: the embedding, the learned vector, or noise from seed 0.
        default: the state of families that have no random one.
        like: a tensor of the shape, dtype and device wanted.
        position_ids: the position of every token.
        noise: rows of random states.

    Raises:
        LoopedError: a state of another shape, or a kind of state that this family does not have.
    """
    if isinstance(asked, Tensor):
        if asked.shape != like.shape:
            raise LoopedError(
                f"initial_state of shape {tuple(asked.shape)} was asked; this run needs "
                f"[batch, pos, d_model] = {tuple(like.shape)}."
            )
        return asked.to(like.device, like.dtype)
    if asked == "zero":
        return torch.zeros_like(like)
    if isinstance(asked, (str, bool)) or not isinstance(asked, (int, torch.Generator, type(None))):
        raise LoopedError(f'initial_state={asked!r} was asked; pass a tensor, an int seed, a torch.Generator or "zero".')
    if default is not None:
        if asked is not None:
            raise LoopedError(
                f"initial_state={asked!r} was asked, but the {noise.cfg.family} initial state is not random; "
                'pass a tensor [batch, pos, d_model], "zero" or nothing.'
            )
        return default
    if isinstance(asked, torch.Generator):
        if asked.device.type != like.device.type:
            raise LoopedError(f"initial_state is a generator on {asked.device}, but the model is on {like.device}.")
        if noise.cfg.noise == "truncated":  # the published code of these families draws twice
            torch.randn(like.shape, generator=asked, dtype=like.dtype, device=like.device)
        return random_normal(torch.empty_like(like), noise.cfg, asked)
    return noise(DEFAULT_SEED if asked is None else asked, position_ids).to(like.device, like.dtype)
