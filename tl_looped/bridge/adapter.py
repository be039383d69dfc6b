"""The one TransformerLens adapter for every looped family."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.types import ComponentMapping

from ..model import LoopedModel
from ..model.config import LoopedConfig
from ..model.experts import Experts
from ..model.norms import RMSNorm
from .components import (
    InputProjection,
    LoopedAttention,
    LoopedExperts,
    LoopedGatedMLP,
    LoopedLinear,
    LoopedMLP,
    LoopedNorm,
    LoopedPart,
    LoopedUnembedding,
    OutputProjection,
    PassBridge,
)
from .processing import LoopedEmbedding, StreamBlock

ARCHITECTURE = "TLLoopedForCausalLM"
_OF_MODEL = frozenset("embed blocks passes prelude_norm value_embeds after_loop ln_final unembed rotary noise".split())
_USUAL = frozenset("ln1 attn ln1_post ln1_stream ln2 mlp ln2_post ln2_stream".split())  # what every block may have


def bridge_config(cfg: LoopedConfig, model_name: str) -> TransformerBridgeConfig:
    """TransformerLens's view of a looped model: one layer for every virtual layer."""
    return TransformerBridgeConfig(
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        n_layers=cfg.schedule.n_layers,
        n_ctx=cfg.n_ctx,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.n_kv_heads,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        d_vocab_out=cfg.d_vocab,
        architecture=ARCHITECTURE,
        model_name=model_name,
        act_fn=cfg.act_fn,
        eps=torch.finfo(torch.float32).eps if cfg.norm_eps is None else cfg.norm_eps,
        rotary_base=cfg.rope_theta,
        rotary_adjacent_pairs=cfg.rope_layout == "pairs",
        tie_word_embeddings=cfg.tied,
        use_qk_norm=cfg.qk_norm != "none",
        qk_norm_after_rope=cfg.qk_norm == "after_rope",
        output_logits_soft_cap=-1.0 if cfg.logit_softcap is None else cfg.logit_softcap,
    )


class LoopedArchitectureAdapter(ArchitectureAdapter):
    """Maps the modules of a `LoopedModel` onto TransformerLens components."""

    supports_hf_output_attentions = False

    def __init__(self, cfg: TransformerBridgeConfig, model: LoopedModel):
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.weight_processing_conversions: dict[str, ParamProcessingConversion | str] | None = {
            **self._qkvo_weight_conversions()
        }
        looped = model.cfg
        self.cfg.gated_mlp = looped.mlp == "gated"
        self.component_mapping: ComponentMapping | None = {
            "embed": LoopedEmbedding(name="embed"),
            **self._norms(model, "prelude_norm"),
            "blocks": self._block(model, looped),
            "passes": PassBridge(name="passes", submodules=self._parts(model.passes)),
            **(
                {"after_loop": LoopedLinear(name="after_loop")}
                if looped.after_loop == "linear"
                else self._norms(model, "after_loop")
            ),
            **self._parts([model], _OF_MODEL),
            "ln_final": LoopedNorm(name="ln_final", config=self.cfg),
            "unembed": LoopedUnembedding(name="unembed", config=self.cfg),
        }

    def _norms(self, parent: nn.Module, *names: str) -> dict[str, GeneralizedComponent]:
        found = {name: part for name in names if (part := getattr(parent, name, None)) is not None}
        kinds = {name: LoopedNorm if isinstance(part, RMSNorm) else LoopedPart for name, part in found.items()}
        return {name: kind(name=name, config=self.cfg) for name, kind in kinds.items()}

    def _parts(self, owners: Iterable[nn.Module], known: Container[str] = ()) -> dict[str, GeneralizedComponent]:
        """What else some modules have hook points in; one of them may lack a part."""
        parts: dict[str, GeneralizedComponent] = {}
        for name, part in [found for owner in owners for found in owner.named_children() if found[0] not in known]:
            if isinstance(part, RMSNorm):
                parts[name] = LoopedNorm(name=name, config=self.cfg, optional=True)
            elif any(slot.startswith("hook_") for slot in part._modules):
                parts[name] = LoopedPart(name=name, config=self.cfg, optional=True)
        return parts

    def _block(self, model: LoopedModel, looped: LoopedConfig) -> StreamBlock:
        block: Any = model.blocks[0]
        attention: dict[str, GeneralizedComponent] = {letter: InputProjection(name=letter) for letter in "qkv"}
        attention["o"] = OutputProjection(name="o")
        if looped.attn_gate:
            attention["gate"] = LoopedLinear(name="gate")
        if looped.qk_norm != "none":
            attention |= self._norms(block.attn, "q_norm", "k_norm")
        attention |= self._norms(block.attn, "inner_norm", "k_conv", "v_conv")
        if isinstance(block.mlp, Experts):
            return self._around(model, block, attention, LoopedExperts(name="mlp", config=self.cfg))
        mlp: dict[str, GeneralizedComponent] = {"in": LoopedLinear(name="up"), "out": LoopedLinear(name="down")}
        if looped.mlp == "gated":
            mlp["gate"] = LoopedLinear(name="gate")
        mlp |= self._norms(block.mlp, "inner_norm")
        kind = LoopedGatedMLP if "gate" in mlp else LoopedMLP
        return self._around(model, block, attention, kind(name="mlp", config=self.cfg, submodules=mlp))

    def _around(
        self, model: LoopedModel, block: nn.Module, attention: dict[str, GeneralizedComponent], mlp: GeneralizedComponent
    ) -> StreamBlock:
        """A block around its attention and its MLP."""
        outputs = {f"hook_{branch}_out": f"{branch}_conv.hook_out" for branch in ("attn", "mlp")}
        return StreamBlock(
            model.cfg,
            {alias: at for alias, at in outputs.items() if hasattr(block, at.partition(".")[0])},
            name="blocks",
            config=self.cfg,
            submodules={
                **self._norms(block, "ln1"),
                "attn": LoopedAttention(name="attn", config=self.cfg, submodules=attention),
                **self._norms(block, "ln1_post", "ln1_stream", "ln2"),
                "mlp": mlp,
                **self._norms(block, "ln2_post", "ln2_stream"),
                **self._parts(model.blocks, _USUAL),
            },
        )
