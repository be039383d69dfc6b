"""`python -m tl_looped.toys.stages` runs experiments/stages_on_text.py; its scores are in `analysis.stage_order`."""

from .._old_names import moved
from ._script import run


def __getattr__(name: str) -> object:
    return moved(__name__, name)


if __name__ == "__main__":
    run("stages_on_text.py")
