"""The memory that loading takes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tl_looped.checkpoints import save_model
from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.model.looped_model import initialise

MEASURE = """
import sys, torch, transformers
from tl_looped.checkpoints import load_model, open_checkpoint

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

checkpoint = open_checkpoint(sys.argv[1])
before = peak()
model = load_model(checkpoint, dtype=torch.float32)
print((peak() - before) / sum(parameter.nbytes for parameter in model.canonical_parameters().values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_loading_500_megabytes_is_below_1_2_times_the_model(dtype: torch.dtype, tmp_path: Path):
    cfg = LoopedConfig(d_model=1024, n_heads=16, d_vocab=16000, n_core=8, n_loops=2, d_mlp=2816)
    save_model(initialise(LoopedModel(cfg), 0).to(dtype), tmp_path)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.2  # 0.15 of which are libraries that are used for the first time
