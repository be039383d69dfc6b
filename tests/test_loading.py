"""Reading and writing checkpoints: what is refused and how, memory, bit-exactness."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import GOLDEN

from tl_looped import LoopedBridge
from tl_looped.checkpoints import Checkpoint, MemoryCheckpoint, load_model, load_tokenizer, open_checkpoint, save_model
from tl_looped.errors import CheckpointError, LoopedError
from tl_looped.model import LoopedModel
from tl_looped.model.config import LoopedConfig
from tl_looped.model.looped_model import initialise

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def copy(family: str, to: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (to / name).write_bytes((GOLDEN / family / name).read_bytes())
    return to


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def shard(path: Path) -> dict[str, str]:
    """Split model.safetensors into two shards; return the index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return files


@torch.no_grad()
def logits(model: LoopedModel) -> torch.Tensor:
    return model(TOKENS).logits


def same(one: LoopedModel, other: LoopedModel) -> bool:
    a, b = one.canonical_parameters(), other.canonical_parameters()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_a_checkpoint_knows_its_tensors_before_it_reads_them():
    checkpoint = open_checkpoint(GOLDEN / "ouro")
    assert checkpoint.path == GOLDEN / "ouro" and checkpoint.config["model_type"] == "ouro"
    stored = load_file(GOLDEN / "ouro" / "model.safetensors")
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert set(checkpoint.dtypes.values()) == {torch.float32}
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in stored.items())
    part = checkpoint.read("lm_head.weight", 64, (3, 32))
    assert torch.equal(part, stored["lm_head.weight"][2:5])
    with pytest.raises(CheckpointError, match=r"'nothing'.*lm_head"):
        checkpoint.read("nothing")


def test_passes_share_parameters():
    model = load_model(open_checkpoint(GOLDEN / "ouro"))
    assert model.blocks[0].attn.q.weight is model.blocks[3].attn.q.weight
    assert not model.training and not any(parameter.is_meta for parameter in model.parameters())


def test_shards(tmp_path: Path):
    shard(copy("huginn", tmp_path))
    assert same(load_model(open_checkpoint(tmp_path)), load_model(open_checkpoint(GOLDEN / "huginn")))


def test_sharded_pickle(tmp_path: Path):
    copy("hrm_text", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "part.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.bin")}))
    with pytest.warns(UserWarning, match=r"part.bin is a pickle"):
        model = load_model(open_checkpoint(str(tmp_path)))
    assert same(model, load_model(open_checkpoint(GOLDEN / "hrm_text")))


def test_dtypes(tmp_path: Path):
    edit_tensors(copy("ouro", tmp_path), lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    checkpoint = open_checkpoint(tmp_path)
    kept, wide = load_model(checkpoint), load_model(checkpoint, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and {p.dtype for p in wide.parameters()} == {torch.float32}
    wide_again = wide.canonical_parameters()
    assert all(torch.equal(p.float(), wide_again[name]) for name, p in kept.canonical_parameters().items())
    assert torch.isfinite(logits(kept)).all()
    with pytest.raises(LoopedError, match=r"torch.int64.*floating-point"):
        load_model(checkpoint, dtype=torch.int64)


def test_memory_is_shared_with_a_model_that_is_already_there():
    tensors = load_file(GOLDEN / "ouro" / "model.safetensors")
    config = json.loads((GOLDEN / "ouro" / "config.json").read_text())
    parameters = load_model(MemoryCheckpoint(config, tensors)).canonical_parameters()
    assert parameters["embed.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    pointers = {tensor.data_ptr() for tensor in tensors.values()}
    assert all(parameter.data_ptr() in pointers for parameter in parameters.values())
    converted = load_model(MemoryCheckpoint(config, tensors), dtype=torch.float64).canonical_parameters()
    assert converted["embed.weight"].dtype == torch.float64


@pytest.mark.parametrize(("counts", "layers"), [({}, 12), ({"n_loops": 1}, 3), ({"n_loops": 6}, 18)])
def test_loop_counts(counts: dict[str, int], layers: int):
    assert load_model(open_checkpoint(GOLDEN / "ouro"), **counts).cfg.schedule.n_layers == layers


@pytest.mark.parametrize("count", [0, -1, 2.0, "3", True])
def test_loop_counts_that_are_none(count: Any, unchecked: None):
    with pytest.raises(LoopedError, match=f"n_loops={re.escape(repr(count))}"):
        load_model(open_checkpoint(GOLDEN / "ouro"), n_loops=count)
    with pytest.raises(LoopedError, match=f"l_cycles={re.escape(repr(count))}"):
        load_model(open_checkpoint(GOLDEN / "hrm_text"), l_cycles=count)


def test_l_cycles_need_two_stacks():
    with pytest.raises(LoopedError, match=r"l_cycles=2.*ouro.*one looped stack"):
        load_model(open_checkpoint(GOLDEN / "ouro"), l_cycles=2)


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(path: Path) -> None:
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def promise_too_much(path: Path) -> None:
    index = {"weight_map": shard(path) | {"extra.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def only_pickle(content: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "model.safetensors").unlink()
        torch.save(content, path / "pytorch_model.bin")

    return damage


def eight_bits(path: Path) -> None:
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))


UNREADABLE = {
    "no config": (lambda path: (path / "config.json").unlink(), r"no config.json.*model.safetensors"),
    "bad JSON": (replace_file("config.json", b"{"), r"config.json is not valid JSON"),
    "JSON list": (replace_file("config.json", b"[]"), r"list, not an object"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"holds no weights.*config.json"),
    "truncated": (truncate, r"model.safetensors is truncated"),
    "empty": (replace_file("model.safetensors", b""), r"model.safetensors is truncated or not"),
    "not safetensors": (replace_file("model.safetensors", b"x" * 99), r"model.safetensors is truncated or not"),
    "8 bits": (eight_bits, r"unknown way: lm_head.weight \(torch.float8_e4m3fn\)"),
    "lost shard": (lose_shard, r"lacks 1 of the 2 files.*model-00002-of-00002.safetensors"),
    "lost tensor": (promise_too_much, r"extra.weight in model-00001"),
    "bad index": (lambda p: (shard(p), (p / "model.safetensors.index.json").write_text("{}")), r"no weight_map"),
    "path in index": (
        lambda p: (shard(p), (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')),
        r"lacks 1 of the 1",
    ),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_files_that_cannot_be_opened(damage: str, tmp_path: Path):
    do, message = UNREADABLE[damage]
    do(copy("ouro", tmp_path))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(print, "weights_only"), ({"a": 1}, "not a dictionary of tensors"), ([1], "not a dictionary")]
)
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_pickles_that_hold_more_than_tensors(content: object, message: str, tmp_path: Path):
    only_pickle(content)(copy("ouro", tmp_path))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 32)


def several(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.x"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


WRONG = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"missing: model.norm.weight \[32\]"),
    "unexpected": (lambda t: t.update(extra=torch.zeros(2)), r"unexpected: extra \[2\]"),
    "shape": (
        widen,
        r"k_proj.weight should be \[32, 32\] from n_kv_heads=4, d_head=8, d_model=32, but is \[16, 32\]",
    ),
    "several": (several, r"(?s)missing: model.layers.0.mlp.up_proj.*unexpected: model.layers.7.x"),
    "NaN": (poison, r"NaN or infinity in model.norm.weight"),
    "quantised": (quantise, r"lm_head.weight is torch.int8"),
}


@pytest.mark.parametrize("damage", WRONG)
def test_tensors_that_do_not_fit(damage: str, tmp_path: Path):
    edit, message = WRONG[damage]
    edit_tensors(copy("ouro", tmp_path), edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(open_checkpoint(tmp_path))


def test_fused_shapes_are_named_with_all_their_fields(tmp_path: Path):
    edit_config(copy("retrofit_llama", tmp_path), num_key_value_heads=1)
    with pytest.raises(
        CheckpointError, match=r"Wqkv.weight should be \[72, 48\] from n_heads=4, d_head=12, d_model=48, n_kv_heads=1"
    ):
        load_model(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("family", "config", "embed"), [("huginn", {}, "transformer.wte.weight"), ("parcae", {}, "transformer.wte.weight")]
)
def test_tied_copies(family: str, config: dict[str, Any], embed: str, tmp_path: Path):
    whole = load_model(open_checkpoint(GOLDEN / family))
    assert whole.embed.weight is whole.unembed.weight
    for dropped in (embed, "lm_head.weight"):
        edit_tensors(copy(family, tmp_path), lambda t, name=dropped: t.pop(name))
        assert same(load_model(open_checkpoint(tmp_path)), whole)
    edit_tensors(copy(family, tmp_path), lambda t: t["lm_head.weight"].add_(1e-3))
    with pytest.raises(CheckpointError, match=rf"ties the embeddings.*{embed} and lm_head.weight differ"):
        load_model(open_checkpoint(tmp_path))


def test_a_tied_config_over_untied_tensors(tmp_path: Path):
    edit_config(copy("ouro", tmp_path), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="differ"):
        load_model(open_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no/such/directory", "/no/such/directory", "not a name"])
def test_names_that_lead_nowhere(name: str):
    with pytest.raises(CheckpointError, match=rf"'{name}' was asked; it is not a directory"):
        open_checkpoint(name)


def test_a_hub_id_that_is_not_cached_offline():
    with pytest.raises(
        CheckpointError, match=r"'a/b' at revision 'main' was asked.*not in the local Hub cache.*HF_HUB_OFFLINE"
    ):
        open_checkpoint("a/b", revision="main")


@pytest.mark.parametrize(("family", "file"), [("ouro", "model.safetensors"), ("parcae", "pytorch_model.bin")])
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_a_hub_id_in_the_local_cache(family: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
    for name in ("config.json", file):
        (snapshot / name).write_bytes((GOLDEN / family / name).read_bytes())
    checkpoint = open_checkpoint("some/model")
    assert checkpoint.path == snapshot and same(load_model(checkpoint), load_model(open_checkpoint(GOLDEN / family)))
    assert open_checkpoint("some/model", revision=commit).path == snapshot


def test_a_revision_of_a_directory():
    with pytest.raises(CheckpointError, match=r"revision='main'.*local directory"):
        open_checkpoint(GOLDEN / "ouro", revision="main")


@pytest.mark.parametrize("family", ["ouro", "huginn", "retrofit_olmo", "hrm_text", "parcae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_is_bit_exact(family: str, dtype: torch.dtype, tmp_path: Path):
    model = load_model(open_checkpoint(GOLDEN / family), dtype=dtype, n_loops=3)
    save_model(model, tmp_path / "new" / "directory")
    checkpoint = open_checkpoint(tmp_path / "new" / "directory")
    assert checkpoint.config["model_type"] == "tl_looped"
    assert set(checkpoint.shapes) == set(model.canonical_parameters())
    again = load_model(checkpoint)
    assert again.cfg == model.cfg and same(again, model) and torch.equal(logits(again), logits(model))


def test_saving_in_shards_replaces_what_was_there(tmp_path: Path):
    model = load_model(open_checkpoint(GOLDEN / "ouro"))
    (tmp_path / "model.of.mine.safetensors").touch()
    for limit, files in ((30_000, 5), (10**9, 1), (60_000, 3)):
        save_model(model, tmp_path, max_shard_bytes=limit)
        assert len([f for f in tmp_path.glob("model*.safetensors") if "mine" not in f.name]) == files
        assert same(load_model(open_checkpoint(tmp_path)), model)
    assert (tmp_path / "model.of.mine.safetensors").exists()


def test_saving_what_was_read_from_fused_memory(tmp_path: Path):
    config = json.loads((GOLDEN / "huginn" / "config.json").read_text())
    model = load_model(MemoryCheckpoint(config, load_file(GOLDEN / "huginn" / "model.safetensors")))
    save_model(model, tmp_path)
    assert same(load_model(open_checkpoint(tmp_path)), model)


def test_saved_config_from_a_newer_version(tmp_path: Path):
    model = initialise(LoopedModel(LoopedConfig(d_model=8, n_heads=2, d_vocab=11, n_core=1, n_loops=2)), 0)
    save_model(model, tmp_path)
    edit_config(tmp_path, looped_config={**model.cfg.to_dict(), "novelty": 1})
    with pytest.raises(CheckpointError, match="novelty"):
        load_model(open_checkpoint(tmp_path))


def test_tokenizer(tmp_path: Path):
    assert load_tokenizer(copy("ouro", tmp_path)) is None
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "loop": 1, "again": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path)("loop again loop")["input_ids"] == [1, 2, 1]
    edit_config(tmp_path, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[UNK]", "tokenizer_class": "Unknown"}))
    found = load_tokenizer(tmp_path)
    assert found("again")["input_ids"] == [2] and found.pad_token == "[UNK]"


def test_sources_of_no_parameter_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tl_looped.families import Source, ouro

    stored = ouro.sources
    monkeypatch.setattr(ouro, "sources", lambda cfg, shapes: {**stored(cfg, shapes), "core.0.attn.oo.weight": Source("x")})
    with pytest.raises(CheckpointError, match=r"ouro names 'core.0.attn.oo.weight'.* Nearest: core.0.attn.o.weight"):
        load_model(open_checkpoint(copy("ouro", tmp_path)))


def test_errors_show_a_part_of_a_long_listing_and_the_words_that_no_token_has(tmp_path: Path):
    for k in range(30):
        (tmp_path / f"file{k:02}").touch()
    with pytest.raises(CheckpointError, match=r"file09 and 20 more"):
        open_checkpoint(tmp_path)
    with pytest.raises(LoopedError, match=r"no token for a part of 'A z \? A': 'z' "):
        LoopedBridge.from_pretrained("toy:hop", device="cpu").to_tokens("A z ? A")


def test_code_that_lies_beside_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from helpers import word_tokenizer

    checkpoint, ran = copy("ouro", tmp_path), tmp_path / "ran"
    word_tokenizer().save_pretrained(checkpoint)
    edit_config(
        checkpoint,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]},
    )
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (checkpoint / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: ...\nModel = T = Tokenizer = Config\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks before it runs such code
    model = LoopedBridge.from_pretrained(checkpoint)
    assert model.to_tokens("t5 t6").tolist() == [[1, 5, 6]] and model.tokenizer.name_or_path == str(checkpoint)
    assert not ran.exists()


def test_the_largest_tensors_are_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed of one, as Dory's unembedding is, takes it twice for a moment."""
    checkpoint, read = open_checkpoint(GOLDEN / "dory"), list[str]()
    whole = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *at: read.append(name) or whole(self, name, *at))
    load_model(checkpoint)
    sizes = [math.prod(checkpoint.shapes[name]) for name in read if len(checkpoint.shapes[name]) == 2]
    assert len(sizes) > 40 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("ouro", {"rope_theta": "abc"}),
        ("ouro", {"rope_scaling": "yarn"}),
        ("ouro", {"rope_scaling": {"type": "yarn"}}),
        ("ouro", {"hidden_act": 5}),
        ("ouro", {"rms_norm_eps": -1}),
        ("ouro", {"rms_norm_eps": "1e-6"}),
        ("retrofit_llama", {"init_values": 3}),
    ],
)
def test_values_of_the_wrong_kind_are_explained(family: str, change: dict[str, Any], tmp_path: Path, unchecked: None) -> None:
    edit_config(copy(family, tmp_path), **change)
    with pytest.raises(CheckpointError):
        load_model(open_checkpoint(tmp_path))


@pytest.mark.parametrize("device", ["nope", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used(device: str) -> None:
    with pytest.raises(LoopedError, match="device="):
        load_model(open_checkpoint(GOLDEN / "ouro"), device=device)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("", "pass a directory or a Hub id"),
        (None, "pass a directory or a Hub id"),
        ("/no/such/directory", "does not exist"),
        (str(GOLDEN / "ouro" / "config.json"), "it is a file"),
    ],
)
def test_what_is_no_checkpoint_is_named(asked: Any, says: str, unchecked: None) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(asked)


def test_a_damaged_tokenizer_does_not_hide_the_model(tmp_path: Path) -> None:
    copy("ouro", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert load_tokenizer(tmp_path) is None
