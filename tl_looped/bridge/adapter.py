"""The one TransformerLens adapter for every looped family."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.types import ComponentMapping

from ..model import LoopedModel
from ..model.config import LoopedConfig
from ..model.norms import RMSNorm
from .components import (
    InputProjection,
    LoopedAttention,
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
        eps=cfg.norm_eps,
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
            "blocks": self._block(model.blocks[0], looped),
            "passes": PassBridge(name="passes", submodules=self._pass_parts(model)),
            **(
                {"after_loop": LoopedLinear(name="after_loop")}
                if looped.after_loop == "linear"
                else self._norms(model, "after_loop")
            ),
            "ln_final": LoopedNorm(name="ln_final", config=self.cfg),
            "unembed": LoopedUnembedding(name="unembed", config=self.cfg),
        }

    def _norms(self, parent: nn.Module, *names: str) -> dict[str, GeneralizedComponent]:
        return {name: LoopedNorm(name=name, config=self.cfg) for name in names if getattr(parent, name) is not None}

    def _pass_parts(self, model: LoopedModel) -> dict[str, GeneralizedComponent]:
        """What the passes have hook points in; a part may be missing in the last pass."""
        parts: dict[str, GeneralizedComponent] = {}
        for name, part in [found for ends in model.passes for found in ends.named_children()]:
            if isinstance(part, RMSNorm):
                parts[name] = LoopedNorm(name=name, config=self.cfg, optional=True)
            elif any(slot.startswith("hook_") for slot in part._modules):
                parts[name] = LoopedPart(name=name, config=self.cfg, optional=True)
        return parts

    def _block(self, block: Any, looped: LoopedConfig) -> StreamBlock:
        attention: dict[str, GeneralizedComponent] = {letter: InputProjection(name=letter) for letter in "qkv"}
        attention["o"] = OutputProjection(name="o")
        if looped.attn_gate:
            attention["gate"] = LoopedLinear(name="gate")
        if looped.qk_norm != "none":
            attention |= self._norms(block.attn, "q_norm", "k_norm")
        attention |= self._norms(block.attn, "inner_norm")
        mlp: dict[str, GeneralizedComponent] = {"in": LoopedLinear(name="up"), "out": LoopedLinear(name="down")}
        if looped.mlp == "gated":
            mlp["gate"] = LoopedLinear(name="gate")
        mlp |= self._norms(block.mlp, "inner_norm")
        return StreamBlock(
            looped,
            name="blocks",
            config=self.cfg,
            submodules={
                **self._norms(block, "ln1"),
                "attn": LoopedAttention(name="attn", config=self.cfg, submodules=attention),
                **self._norms(block, "ln1_post", "ln1_stream", "ln2"),
                "mlp": (LoopedGatedMLP if "gate" in mlp else LoopedMLP)(name="mlp", config=self.cfg, submodules=mlp),
                **self._norms(block, "ln2_post", "ln2_stream"),
            },
        )
