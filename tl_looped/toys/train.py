"""`python -m tl_looped.toys.train` runs experiments/train_toys.py, which trains the toys."""

from ._script import run

if __name__ == "__main__":
    run("train_toys.py")
