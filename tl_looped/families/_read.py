"""Reading a config.json: every key has a kind, and a key that nobody reads is not passed over."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, cast

from ..errors import CheckpointError
from ..kinds import Kind, shown

# Arithmetic that other decoders have and no family here, with the value that means: as if it were not there.
_NEUTRAL: dict[str, object] = {
    **dict.fromkeys("logit_scale logits_scaling output_multiplier lm_head_multiplier logits_multiplier".split(), 1.0),
    **dict.fromkeys("embedding_multiplier embed_scale scale_emb input_scale embedding_scale".split(), 1.0),
    **dict.fromkeys("residual_multiplier residual_scale scale_depth depth_multiplier width_multiplier".split(), 1.0),
    **dict.fromkeys("partial_rotary_factor rotary_pct rotary_percent rope_pct rope_condense_ratio".split(), 1.0),
    **dict.fromkeys("attention_multiplier attention_scale attn_scale query_pre_attn_scalar softmax_scale rotary_dim".split()),
    **dict.fromkeys("key_multiplier attention_in_multiplier attention_out_multiplier attention_value_scale".split(), 1.0),
    **dict.fromkeys("final_logit_softcapping final_logits_softcapping logit_softcap logit_softcapping".split()),
    **dict.fromkeys("attn_logit_softcapping attn_logit_softcap attention_logit_cap softcap logits_soft_cap".split()),
    **dict.fromkeys("clip_qkv attention_chunk_size attention_window sliding_window window_size sliding_window_pattern".split()),
    **dict.fromkeys("rope_scaling rope_parameters rope_local_base_freq global_rope_theta local_rope_theta".split()),
    **dict.fromkeys("rope_interleave rope_interleaved rotary_interleaved interleaved_rope rope_is_neox_style".split()),
    **dict.fromkeys("quantization_config compression_config adapter_config".split()),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts n_experts".split(), 0),
    **dict.fromkeys("attention_sinks use_attention_sinks attention_sink use_sinks num_sink_tokens".split(), False),
    **dict.fromkeys("qk_norm use_qk_norm qk_layernorm alibi use_alibi scale_embedding scale_embeddings".split(), False),
    **dict.fromkeys("attention_bias mlp_bias qkv_bias use_bias use_qkv_bias add_bias_linear lm_head_bias".split(), False),
    **dict.fromkeys("use_parallel_residual parallel_attn use_post_norm use_sliding_window add_cross_attention".split(), False),
    **dict.fromkeys("scale_attn_by_inverse_layer_idx attn_temperature_tuning reorder_and_upcast_attn".split(), False),
    "no_rope_layers": (),
    "is_causal": True,
    "is_encoder_decoder": False,
}
# What transformers writes into every config.json and no forward of a decoder reads, or what training alone reads.
_HARMLESS = frozenset(
    """
    architectures auto_map base_model_tp_plan base_model_pp_plan chunk_size_feed_forward cross_attention_hidden_size dtype
    custom_pipelines finetuning_task id2label is_decoder keys_to_ignore_at_inference label2id max_window_layers model_type
    no_rope_layer_interval num_labels output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    pruned_heads return_dict return_dict_in_generate task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class
    torch_dtype torchscript use_bfloat16 use_cache use_return_dict attn_implementation gradient_checkpointing
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id mask_token_id decoder_start_token_id
    bad_words_ids begin_suppress_tokens suppress_tokens do_sample early_stopping temperature top_k top_p typical_p min_p
    diversity_penalty encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    remove_invalid_values repetition_penalty initializer_range init_std initializer_std attention_dropout attn_dropout
    attn_pdrop classifier_dropout dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob resid_pdrop
    residual_dropout
    """.split()
)
_NOTES = ("_*", "*_version", "*_hash", "*_commit", "*_path", "*_url", "license", "language", "tags", "note*", "comment*")


class Recorded(Mapping[str, Any]):
    """A config.json that remembers which of its keys were asked for."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def check_unread(self, family: str) -> None:
        """Refuse known arithmetic that the family did not ask for; warn of keys that are not known at all.

        The published code of a family does not read keys that it does not have either. Only a newer version of it might, which
        is worth a warning and not a refusal: a config.json also carries notes of trainers and converters.
        """
        unread = {key: value for key, value in self._config.items() if key not in self.asked and value is not None}
        quantised = unread.get("quantization_config")
        if isinstance(quantised, dict) and cast("dict[str, Any]", quantised).get("quant_method") == "gguf":
            del unread["quantization_config"]  # transformers leaves it in models that it has dequantised
        only(unread, **{key: value for key, value in _NEUTRAL.items() if key in unread})
        layer_types = unread.get("layer_types", [])
        only(unread, layer_types=["full_attention"] * (len(layer_types) if isinstance(layer_types, list) else 0))
        known = _HARMLESS | _NEUTRAL.keys() | {"layer_types"}
        unknown = [key for key in unread if key not in known and not any(fnmatch(key, pattern) for pattern in _NOTES)]
        if unknown:
            more = f" and {len(unknown) - 8} keys more" if len(unknown) > 8 else ""
            warnings.warn(
                f"config.json has {', '.join(f'{key}={shown(unread[key])}' for key in unknown[:8])}{more}, which the family "
                f"{family} does not know and does not read. If they change what the published model computes, the logits here "
                "are not its logits; otherwise remove them from config.json.",
                stacklevel=2,
            )


def need(config: Mapping[str, Any], key: str, kind: Kind[Any] | None = None) -> Any:
    """The value of a key that a config.json must have.

    Args:
        config: the content of config.json.
        key: the key.
        kind: what its value may be, such as `count()`; None for anything.

    Raises:
        CheckpointError: it is missing or null.
        LoopedError: it is of another kind.
    """
    value = config.get(key)
    if value is None:
        raise CheckpointError(
            f"config.json has no {key!r}, which a {model_kind(config)} checkpoint needs; it has "
            f"{', '.join(sorted(map(str, config)))}. Restore the config.json the checkpoint was published with."
        )
    return value if kind is None else kind(key, value)


def get(config: Mapping[str, Any], key: str, default: Any, kind: Kind[Any] | None = None) -> Any:
    """The value of an optional key; null counts as missing.

    Args:
        config: the content of config.json.
        key: the key.
        default: the value of a missing key.
        kind: what its value may be, such as `number()`; None for anything.

    Raises:
        LoopedError: it is of another kind.
    """
    value = config.get(key)
    return default if value is None else value if kind is None else kind(key, value)


def model_kind(config: Mapping[str, Any]) -> str:
    """What a config.json calls its model."""
    name = config.get("model_type") or config.get("_class_name")
    return name if isinstance(name, str) else "checkpoint of unknown type"


def only(config: Mapping[str, Any], **implemented: Any) -> None:
    """Refuse a config.json in which an option has another value than the implemented one; a missing or null option passes.

    Args:
        config: the content of config.json.
        **implemented: the values that are implemented, by key.

    Raises:
        CheckpointError: an option has another value.
    """
    for key, value in implemented.items():
        found = config.get(key)
        if found is None or (not found and not value):  # False, 0, [] and "" all mean: off
            continue
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise CheckpointError(
                f"this {model_kind(config)} checkpoint has {key}={shown(found)}, which is not implemented; only "
                f"{key}={value!r} is. Load a checkpoint without this option."
            )


def unused(config: Mapping[str, Any], keys: str) -> None:
    """Say that keys are known and change no logits, so that nobody is warned of them.

    Args:
        config: the content of config.json.
        keys: patterns of keys, as in `fnmatch`, with spaces between them.
    """
    for key in config:
        if any(fnmatch(key, pattern) for pattern in keys.split()):
            config.get(key)
