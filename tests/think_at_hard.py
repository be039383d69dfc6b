"""Think-at-Hard from its formulas, as a plain PyTorch module that knows nothing of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Adapted(nn.Linear):
    """A map to which later iterations add one of low rank."""

    scale = 0.0

    def forward(self, x: Tensor, later: bool) -> Tensor:  # type: ignore[override]
        out = F.linear(x, self.weight)
        return out + self.scale * x @ self.lora_A.T @ self.lora_B.T if later and self.scale else out


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.n, d, width = c["head_dim"], c["hidden_size"], c["head_dim"] * c["num_attention_heads"]
        kv = c["head_dim"] * c["num_key_value_heads"]
        self.groups = c["num_attention_heads"] // c["num_key_value_heads"]
        self.q_proj, self.o_proj = Adapted(d, width, bias=False), Adapted(width, d, bias=False)
        self.k_proj, self.v_proj = Adapted(d, kv, bias=False), Adapted(d, kv, bias=False)
        self.q_norm, self.k_norm = Norm(self.n, c["rms_norm_eps"]), Norm(self.n, c["rms_norm_eps"])
        self.theta = c["rope_theta"]

    def forward(self, x: Tensor, active: Tensor, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        n_pos, later = x.shape[1], bool(seen)
        angle = torch.arange(n_pos)[:, None] * self.theta ** (-torch.arange(0, self.n, 2).float() / self.n)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, self.n)).transpose(1, 2)

        def turned(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

        q, k = turned(self.q_norm(heads(self.q_proj(x, later)))), turned(self.k_norm(heads(self.k_proj(x, later))))
        v = heads(self.v_proj(x, later))
        seen.append((k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1), active))
        keys, values = (torch.cat([each[i] for each in seen], 2) for i in (0, 1))
        causal = torch.arange(n_pos) <= torch.arange(n_pos)[:, None]
        allowed = torch.cat([causal & each[2][:, None] & active[..., None] for each in seen], 2)[:, None]
        allowed[..., -n_pos:] |= torch.eye(n_pos, dtype=torch.bool)  # what does not run is zero, and sees itself
        pattern = (q @ keys.mT / self.n**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        return self.o_proj((pattern @ values).transpose(1, 2).flatten(2), later)


class MLP(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, width = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = Adapted(d, width, bias=False), Adapted(d, width, bias=False)
        self.down_proj = Adapted(width, d, bias=False)

    def forward(self, x: Tensor, later: bool) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, later)) * self.up_proj(x, later), later)


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.input_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x: Tensor, active: Tensor, seen: list[Any]) -> Tensor:
        later = bool(seen)
        x = x + self.self_attn(self.input_layernorm(x), active, seen)
        return x + self.mlp(self.post_attention_layernorm(x), later)


class Decider(nn.Module):
    """Whether a token goes through the layers again."""

    def __init__(self, given: dict[str, Any], state: dict[str, Tensor]):
        super().__init__()
        self.given, self.p = given, {name: nn.Parameter(tensor) for name, tensor in state.items()}

    def forward(self, states: list[Tensor], logits: Tensor) -> Tensor:
        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.p[f"{name}.bias"])

        f = torch.cat([states[i] for i in self.given["hidden_states_layer_nums"]], -1)
        top = logits.topk(self.given["topk"], -1).values
        if self.given["normalize_input"]:
            f, top = norm("layer_norm_hidden_states", f), top.softmax(-1)
        x = linear("combined_projection", torch.cat((f, linear("logits_projection", top)), -1))
        x = linear("backbone.input_projection", x)
        for i in range(len(self.given["hidden_dims"])):
            at = f"backbone.blocks.{i}"
            out = linear(f"{at}.mlp.3", F.gelu(linear(f"{at}.mlp.0", norm(f"{at}.layer_norm", x))))
            x = out + (linear(f"{at}.dim_change", x) if f"{at}.dim_change.weight" in self.p else x)
        return linear("backbone.output_layer.1", norm("backbone.output_layer.0", x)).squeeze(-1)


class ThinkAtHard(nn.Module):
    def __init__(self, directory: Path):
        super().__init__()
        c = json.loads((directory / "config.json").read_text())
        given = json.loads((directory / "tah_config.json").read_text())
        self.max_iter, self.top_k = given["max_iter"], min(given["input_updater_kwargs"]["topk"], c["vocab_size"])
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        stored = load_file(directory / "model.safetensors")
        stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
        self.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stored.items()})
        for name, tensor in load_file(directory / "lora" / "adapter_model.safetensors").items():
            path, _, part = name.removeprefix("base_model.model.model.").removesuffix(".weight").rpartition(".")
            module = self.get_submodule(path)
            module.register_buffer(part, tensor)
            module.scale = given["adapter_kwargs"]["lora_alpha"] / given["adapter_kwargs"]["r"]
        decider = torch.load(directory / "iter_decider.bin", weights_only=False)["state_dict"]
        self.decider = Decider(given["iter_decider_kwargs"], {name: t for name, t in decider.items() if name != "threshold"})
        self.threshold = given["iter_decider_kwargs"]["threshold"]

    def forward(self, tokens: Tensor, depth: Tensor | None = None) -> Tensor:
        """The logits; `depth` says how often every token runs, the decider where it is not given."""
        x, active = self.embed_tokens(tokens), torch.ones_like(tokens, dtype=torch.bool)
        cumulated, seen = torch.zeros(*tokens.shape, len(self.lm_head.weight)), [[] for _ in self.layers]
        self.halt, self.depth = [], torch.zeros_like(tokens)
        for t in range(self.max_iter):
            states = [x]
            for layer, of_layer in zip(self.layers, seen, strict=True):
                x = layer(x, active, of_layer)
                states.append(x)
            states[-1] = self.norm(x)
            cumulated = cumulated + active[..., None] * self.lm_head(states[-1])
            self.depth = self.depth + active
            if t + 1 == self.max_iter:
                break
            z = self.decider(states, cumulated)
            self.halt.append(z)
            active = active & (z.sigmoid() > self.threshold if depth is None else depth > t + 1)
            top = cumulated.topk(self.top_k, -1)
            x = active[..., None] * (top.values.softmax(-1)[..., None] * self.embed_tokens.weight[top.indices]).sum(-2)
        return cumulated
