"""Which share of the work a process takes: told by hand, or by what started it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LoopedError

# Who started a process says its number and how many there are: torchrun and accelerate, srun, mpirun.
RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")


@dataclass(frozen=True)
class Share:
    """One of several shares of the work.

    Args:
        index: which one, from 0 on.
        of: how many there are.
        told_by: what said so.
    """

    index: int = 0
    of: int = 1
    told_by: str = "nothing"

    def __str__(self) -> str:
        return f"share {self.index + 1}/{self.of}"

    @classmethod
    def read(cls, text: str | None) -> Share:
        """The share of this process.

        Args:
            text: such as "3/8", the third of eight; None for what torchrun, accelerate or Slurm say, or all of the work.

        Raises:
            LoopedError: no such share.

        Example:
            >>> Share.read("3/8").index
            2
        """
        return _of_environment(os.environ) if text is None else _of_text(text)


def _of_text(text: str) -> Share:
    try:
        index, of = (int(number) for number in str(text).split("/"))
    except ValueError:
        index, of = 0, 0
    if not 1 <= index <= of:
        raise LoopedError(f"the share {text!r} was asked; write 3/8 for the third of eight, counted from 1/8 to 8/8.")
    return Share(index - 1, of, "hand")


def _of_environment(env: Mapping[str, str]) -> Share:
    """A task of an array may itself be several processes, which share its share."""
    inner = next((_counted(env, *names) for names in RANKS if all(env.get(name) for name in names)), Share())
    if not env.get(ARRAY[0]):
        return inner
    if not env.get(ARRAY[3]):  # all of the work would be done by every task
        raise LoopedError(
            f"{ARRAY[0]}={env[ARRAY[0]]} is in the environment without {ARRAY[3]}, so nobody knows of how many tasks; unset "
            "it, or pass the share by hand, such as 3/8."
        )
    number, first, step, count = (_number(env, name, default) for name, default in zip(ARRAY, (0, 0, 1, 1), strict=True))
    for name, value in ((ARRAY[2], step), (ARRAY[3], count)):
        if value < 1:
            raise LoopedError(f"{name}={value} is in the environment, which no Slurm array has; unset it and {ARRAY[0]}.")
    index, rest = divmod(number - first, step)
    if rest or not 0 <= index < count:
        raise LoopedError(
            f"task {number} of a Slurm array with gaps was started, whose place among its {count} tasks Slurm does not tell; "
            f"use an array such as 1-{count}, or pass the share by hand, such as 1/{count}."
        )
    told_by = ARRAY[0] + (f" and {inner.told_by}" if inner.of > 1 else "")
    return Share(index * inner.of + inner.index, count * inner.of, told_by)


def _counted(env: Mapping[str, str], index: str, of: str) -> Share:
    share = Share(_number(env, index, 0), _number(env, of, 1), f"{index} and {of}")
    if not 0 <= share.index < share.of:
        raise LoopedError(f"{index}={share.index} and {of}={share.of} are in the environment, which is no share; unset them.")
    return share


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError:
        raise LoopedError(f"{name}={env[name]!r} is in the environment, which is no number; unset it.") from None
