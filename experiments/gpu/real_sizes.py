"""What the package costs at published sizes: `python experiments/gpu/real_sizes.py [MODEL ...] [--small] [--device DEVICE]`.

Weights are random, in bf16, and made on the device, so no checkpoint is needed; times and memory do not depend on them. Every
measurement is printed as one line of JSON as soon as it is made. `--small` is the same on narrow models, for a CPU. Ratios are
of medians of runs in turn. docs/cost.md quotes the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import HrmTextConfig, HrmTextForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import initialization as init

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.analysis import fixed_points
from tl_looped.model import LoopedModel
from tl_looped.patching import patch_sweep

sys.path.insert(0, str(Path(__file__).parents[1]))
import published
from published import twin

GB = 1e9
CONFIGS = {name: published.read(name)[1] for name in published.CONFIGS}


def small(cfg: LoopedConfig) -> LoopedConfig:
    """A narrow model with the same loops and layers."""
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2 if cfg.n_kv_heads != cfg.n_heads else 4, "d_head": 8, "d_mlp": 48}
    fewer = {"n_core": min(cfg.n_core, 4), "windows": ()}
    return cfg.replace(**sizes, **fewer, n_loops=min(cfg.n_loops, 4), d_vocab=512)


class Bench:
    """One device, and what is printed."""

    def __init__(self, device: str, is_small: bool):
        self.device, self.is_small = torch.device(device), is_small
        self.cuda = self.device.type == "cuda"
        self.began = time.perf_counter()

    def say(self, what: str, **values: Any) -> None:
        """Print one measurement."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps({"what": what, **rounded, "at": round(time.perf_counter() - self.began, 1)}), flush=True)

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """How long a run takes."""
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - start

    def in_turn(self, *runs: Callable[[], object], rounds: int = 5) -> list[float]:
        """Median seconds of several runs, one after the other in every round."""
        for run in runs:
            run()
        return [
            statistics.median(times) for times in zip(*([self.seconds(r) for r in runs] for _ in range(rounds)), strict=True)
        ]

    def peak(self, run: Callable[[], object]) -> float:
        """Bytes at the highest point of a run beyond the ones before it; 0 without CUDA."""
        if not self.cuda:
            run()
            return 0
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def part(self, name: str) -> Any:
        """What goes wrong in one measurement is printed and ends no other."""
        try:
            yield
        except Exception as error:
            self.say(f"{name}: FAILED", error=f"{type(error).__name__}: {str(error)[:300]}")
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


@torch.no_grad()
def random_model(cfg: LoopedConfig, device: torch.device, dtype: torch.dtype) -> LoopedModel:
    """A model whose matrices keep the size of what they are given; norms 1, the rest 0."""
    with torch.device("meta"):
        model = LoopedModel(cfg)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in sorted(model.canonical_parameters().items()):
        value = torch.zeros(p.shape, dtype=dtype, device=device)
        if p.ndim == 2:
            size = 1 if cfg.norm_kind == "l2" and name.startswith("unembed") else p.shape[-1] ** -0.5  # of logits, about 1
            value.normal_(0, size, generator=generator)
        elif name.endswith(("weight", "rate", "q_gain")):
            value.fill_(0.05 if name.endswith("rate") else cfg.d_head if name.endswith("q_gain") else 1)  # Dory's, untrained
        model.set_parameter(name, nn.Parameter(value, requires_grad=False))
    return model.eval()


@torch.no_grad()
def measure(name: str, bench: Bench) -> None:
    """Everything about one model."""
    cfg = small(CONFIGS[name]) if bench.is_small else CONFIGS[name]
    dtype = torch.bfloat16
    model = random_model(cfg, bench.device, dtype)
    plain = twin(model)
    start = time.perf_counter()
    bridge = LoopedBridge(model)
    built = time.perf_counter() - start
    n_bytes = sum(p.nbytes for p in {id(p): p for p in model.canonical_parameters().values()}.values())
    bench.say(f"{name}: size", virtual_layers=bridge.cfg.n_layers, gigabytes=n_bytes / GB, seconds_to_wrap=built)

    def tokens(batch: int, pos: int, seed: int = 0) -> Tensor:  # on the CPU, as prompts are
        return torch.randint(0, cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))

    for batch, pos in ((1, 20), (1, 512), (8, 512)):
        with bench.part(f"{name}: forward"):
            text = tokens(batch, pos // (16 if bench.is_small else 1) + 1).to(bench.device)
            own, bare = bench.in_turn(lambda text=text: bridge(text), lambda text=text: plain(text))
            peaks = [n_bytes + bench.peak(lambda m=m, text=text: m(text)) for m in (bridge, plain)]
            bench.say(
                f"{name}: forward", batch=batch, pos=text.shape[1], seconds=own, bare=bare, ratio=own / bare,
                same=bool(torch.equal(bridge(text), plain(text).logits)), peak_gb=peaks[0] / GB, peak_ratio=peaks[0] / peaks[1],
            )  # fmt: skip

    with bench.part(f"{name}: cache"):
        text = tokens(1, 32 if bench.is_small else 512)
        site = "loops.*.blocks.0.hook_resid_post" if cfg.l_cycles is None else "H.loops.*.blocks.0.hook_resid_post"
        cached, bare = bench.in_turn(
            lambda: bridge.run_with_cache(text, names_filter=site), lambda: plain(text.to(bench.device)), rounds=3
        )
        _, cache = bridge.run_with_cache(text, names_filter=site)
        held = sum(value.nbytes for value in cache.values())
        del cache
        high = n_bytes + bench.peak(lambda: bridge.run_with_cache(text, names_filter=site))
        low = n_bytes + bench.peak(lambda: plain(text.to(bench.device)))
        bench.say(f"{name}: one site cached over all loops", ratio=cached / bare, held_gb=held / GB, peak_ratio=high / low)

    for batch, n_new in ((1, 16), (16, 16)):
        with bench.part(f"{name}: generate"):
            text = tokens(batch, 8 if bench.is_small else 32)

            def generate(text: Tensor = text, n: int = n_new) -> object:
                return bridge.generate(
                    text, max_new_tokens=n, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens"
                )

            def bare_loop(text: Tensor = text, n: int = n_new) -> None:
                out = plain(text.to(bench.device), use_cache=True)
                for _ in range(n - 1):
                    newest = out.logits[:, -1:].argmax(-1)
                    out = plain(newest, use_cache=True, past_key_values=out.past_key_values)

            own, bare = bench.in_turn(generate, bare_loop, rounds=1)
            bench.say(f"{name}: generate", batch=batch, new=n_new, tokens_per_second=batch * n_new / own, ratio=own / bare)

    with bench.part(f"{name}: bf16"):
        exact = LoopedBridge(twin(model, torch.float32))
        text = tokens(2, 16 if bench.is_small else 256)
        wide = exact.readouts(text, lambda loop, logits: log_softmax(logits.float(), -1))
        found = bridge.readouts(text, lambda loop, logits: log_softmax(logits.float(), -1))
        kl = [float(kl_div(b, a, log_target=True, reduction="none").sum(-1).mean()) for a, b in zip(wide, found, strict=True)]
        top = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(wide, found, strict=True)]
        entropy = float(-(wide[-1].exp() * wide[-1]).sum(-1).mean())
        picked = sorted({0, 1, 3, 7, 15, len(kl) - 1} & set(range(len(kl))))
        bench.say(
            f"{name}: bf16 against fp32", loops=picked, kl=[float(f"{kl[t]:.3g}") for t in picked],
            top1=[round(top[t], 4) for t in picked], entropy_of_the_last=entropy,
        )  # fmt: skip
        del exact, wide, found

    if name == "Ouro-1.4B":
        more(name, bridge, plain, bench, tokens)
    del model, bridge, plain
    beside = {"Ouro-1.4B": llama, "HRM-Text-1B": hrm}
    if name in beside:
        with bench.part(f"{name}: {beside[name].__name__}"):
            beside[name](name, bench, tokens)


def more(name: str, bridge: LoopedBridge, plain: LoopedModel, bench: Bench, tokens: Callable[..., Tensor]) -> None:
    """What is measured of one model only: sweeps, many loops, graphs, and TransformerLens's bridge of as many layers."""
    with bench.part(f"{name}: sweep"):
        n_pos = 20
        corrupted, clean = tokens(1, n_pos, 1), tokens(1, n_pos, 2)
        _, cache = bridge.run_with_cache(clean)

        def metric(logits: Tensor) -> Tensor:
            return logits[:, -1, 3] - logits[:, -1, 4]

        def run() -> Any:
            axes = ("loop", "layer", "pos")
            return patch_sweep(bridge, corrupted, cache, metric, site="resid_pre", axes=axes, verbose=False)

        first = bench.seconds(run)
        own, high = bench.seconds(run), bench.peak(run)
        one = bench.in_turn(lambda: plain(corrupted.to(bench.device)), rounds=9)[0]
        values = run().values
        cells, worst = [(0, 0, 3), (1, 2, n_pos - 1), (3, 3, 11)], 0.0
        for t, j, pos in cells:
            hook = f"loops.{t}.blocks.{j}.hook_resid_pre"

            def patch(x: Tensor, hook: Any, pos: int = pos) -> Tensor:
                x[:, pos] = cache[hook.name][:, pos]
                return x

            alone = metric(bridge.run_with_hooks(corrupted, fwd_hooks=[(hook, patch)]))
            worst = max(worst, float((alone - values[t, j, pos].to(alone.device)).abs().max()))
        n_cells = values.numel()
        bench.say(
            f"{name}: patch sweep", cells=n_cells, seconds=own, first_call=first, one_forward=one,
            one_forward_a_cell_ratio=one * n_cells / own, peak_gb=high / GB, worst_difference=worst,
            spread=float(values.float().std()),
        )  # fmt: skip
        del cache

    with bench.part(f"{name}: graph"):
        for batch, pos in ((1, 20), (8, 512)) if bench.cuda else ():
            embeds = plain.embed(tokens(batch, pos).to(bench.device))
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(2):
                    plain(inputs_embeds=embeds)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                plain(inputs_embeds=embeds)
            eager, replayed = bench.in_turn(lambda e=embeds: plain(inputs_embeds=e), graph.replay)
            bench.say(f"{name}: CUDA graph of a run", batch=batch, pos=pos, eager=eager, graph=replayed, ratio=eager / replayed)
            del graph

    with bench.part(f"{name}: compile"):
        embeds = plain.embed(tokens(1, 20).to(bench.device))
        compiled = twin(plain)
        backend: Any = {} if bench.cuda else {"backend": "eager"}
        for block in compiled.blocks:
            block.compile(dynamic=False, **backend)
        first = bench.seconds(lambda: compiled(inputs_embeds=embeds))
        eager, fast = bench.in_turn(lambda: plain(inputs_embeds=embeds), lambda: compiled(inputs_embeds=embeds))
        bench.say(
            f"{name}: torch.compile of the blocks",
            batch=1,
            pos=20,
            first_call=first,
            eager=eager,
            compiled=fast,
            ratio=eager / fast,
        )
        del compiled
        torch._dynamo.reset()

    with bench.part(f"{name}: fixed_points"):
        n_prompts, pos, rows = (8, 8, 4) if bench.is_small else (256, 64, 128)
        prompts = [tokens(rows, pos, seed) for seed in range(n_prompts // rows)]
        deep: list[Any] = []
        high = bench.peak(lambda: deep.append(bench.seconds(lambda: fixed_points(bridge, prompts, n_loops=128, verbose=False))))
        low = bench.peak(lambda: plain(prompts[0].to(bench.device)))
        held = sum(p.nbytes for p in plain.canonical_parameters().values())
        bench.say(
            f"{name}: fixed_points at 128 loops", prompts=n_prompts, pos=pos, batch=rows, seconds=deep[0],
            peak_gb=(held + high) / GB,
            peak_over_model_and_a_batch=(held + high) / (held + low),
        )  # fmt: skip


def quick_hf(kind: Any, config: Any, bench: Bench) -> Any:
    """A model of transformers with random bf16 weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device, init.no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.ndim == 2:
            p.normal_(0, p.shape[-1] ** -0.5)
        else:
            p.fill_(1)
    return model.eval()


def llama(name: str, bench: Bench, tokens: Callable[..., Tensor]) -> None:
    """A Llama with as many layers as this model executes: bare, in TransformerLens's bridge, and in this package's."""
    cfg = small(CONFIGS[name]) if bench.is_small else CONFIGS[name]
    config = LlamaConfig(
        vocab_size=cfg.d_vocab, hidden_size=cfg.d_model, intermediate_size=cfg.d_mlp, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads, num_hidden_layers=cfg.schedule.n_layers, max_position_embeddings=4096,
        use_cache=False,
    )  # fmt: skip
    hf = quick_hf(LlamaForCausalLM, config, bench)
    ours = LoopedBridge.loop_layers(hf, start=1, stop=2, n_loops=1)
    bare = twin(ours.plain)
    for batch, pos in ((1, 20), (8, 512)):
        text = tokens(batch, pos // (16 if bench.is_small else 1) + 1).to(bench.device)
        times = bench.in_turn(lambda t=text: hf(t, use_cache=False), lambda t=text: bare(t), lambda t=text: ours(t), rounds=5)
        peaks = [bench.peak(lambda m=m, t=text: m(t)) / GB for m in (hf, ours)]
        difference = float((hf(text, use_cache=False).logits - ours(text)).abs().max())
        bench.say(
            f"{name}: Llama of as many layers", layers=cfg.schedule.n_layers, batch=batch, pos=text.shape[1], hf=times[0],
            plain=times[1], ours=times[2], ours_over_hf=times[2] / times[0], peak_gb_hf=peaks[0], peak_gb_ours=peaks[1],
            worst_difference=difference,
        )  # fmt: skip
    text = tokens(1, 32 if bench.is_small else 512).to(bench.device)
    site = "blocks.*.hook_resid_post"
    every = bench.in_turn(lambda: ours.run_with_cache(text, names_filter=site), lambda: ours.run_with_cache(text), rounds=3)
    del ours, bare
    theirs = build_bridge_from_module(
        hf, "LlamaForCausalLM", hf_config=config, dtype=torch.bfloat16, device=str(bench.device), model_name="llama"
    )
    names = [f"blocks.{i}.hook_out" for i in range(cfg.schedule.n_layers)]
    cached = bench.in_turn(
        lambda: theirs.run_with_cache(text, names_filter=names), lambda: theirs.run_with_cache(text), rounds=3
    )
    bench.say(f"{name}: TransformerLens, cache", pos=text.shape[1], theirs_residuals=cached[0], ours_residuals=every[0],
              theirs_everything=cached[1], ours_everything=every[1])  # fmt: skip
    for batch, pos in ((1, 20), (8, 512)):
        text = tokens(batch, pos // (16 if bench.is_small else 1) + 1).to(bench.device)
        time_ = bench.in_turn(lambda t=text: theirs(t), rounds=5)[0]
        high = bench.peak(lambda t=text: theirs(t)) / GB
        bench.say(f"{name}: TransformerLens's bridge", batch=batch, pos=text.shape[1], seconds=time_, peak_gb=high)


def hrm(name: str, bench: Bench, tokens: Callable[..., Tensor]) -> None:
    """HRM-Text as transformers runs it, against this package."""
    cfg = small(CONFIGS[name]) if bench.is_small else CONFIGS[name]
    kind: Any = HrmTextConfig
    config = kind(
        vocab_size=cfg.d_vocab, hidden_size=cfg.d_model, intermediate_size=cfg.d_mlp, num_layers_per_stack=cfg.n_core,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, head_dim=cfg.d_head, H_cycles=cfg.n_loops,
        L_cycles=cfg.l_cycles, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    hf = quick_hf(HrmTextForCausalLM, config, bench)
    ours = LoopedBridge.from_hf(hf)
    for batch, pos in ((1, 20), (8, 512)):
        text = tokens(batch, pos // (16 if bench.is_small else 1) + 1).to(bench.device)
        own, bare = bench.in_turn(lambda t=text: ours(t), lambda t=text: hf(t, use_cache=False), rounds=5)
        peaks = [bench.peak(lambda m=m, t=text: m(t)) / GB for m in (hf, ours)]
        difference = float((hf(text, use_cache=False).logits - ours(text)).abs().max())
        bench.say(f"{name}: transformers", batch=batch, pos=text.shape[1], hf=bare, ours=own, ratio=own / bare,
                  peak_gb_hf=peaks[0], peak_gb_ours=peaks[1], worst_difference=difference)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description="What the package costs at published sizes.")
    parser.add_argument("models", nargs="*", default=[*CONFIGS], help="which")
    parser.add_argument("--small", action="store_true", help="narrow models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    bench = Bench(args.device, args.small)
    what = torch.cuda.get_device_name() if bench.cuda else "CPU"
    bench.say("machine", device=what, torch=torch.__version__)
    for name in args.models:
        with bench.part(name):
            measure(name, bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
