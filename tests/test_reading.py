"""Prompts from files and data sets: what is read, and what only the user can choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tl_looped.errors import LoopedError
from tl_looped.runs import read_prompts

ROWS: list[Any] = [{"id": k, "question": f"q{k}", "answer": f"a{k}"} for k in range(6)]


def jsonl(place: Path, rows: list[Any]) -> str:
    place.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(place)


def test_lines_of_a_text_file_without_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one: 1\n\n  \ntwo\nthree", encoding="utf-8")
    assert read_prompts(file) == ["one: 1", "two", "three"] and read_prompts(file, n=2) == ["one: 1", "two"]


def test_a_column_of_records_named_or_told_by_its_name(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ROWS)
    assert read_prompts(file, n=2) == ["q0", "q1"] and read_prompts(f"{file}:answer")[5] == "a5"
    chosen = read_prompts(file, n=4, seed=3)
    assert len(chosen) == 4 and chosen == sorted(chosen) == read_prompts(file, n=4, seed=3) != ["q0", "q1", "q2", "q3"]
    assert read_prompts(jsonl(tmp_path / "b.jsonl", [{"words": "w", "n": 1}])) == ["w"]
    assert read_prompts(jsonl(tmp_path / "c.jsonl", ["plain", ""])) == ["plain"]
    (ids,) = read_prompts(jsonl(tmp_path / "d.jsonl", [{"tokens": [3, 1, 4]}]))
    assert not isinstance(ids, str) and ids.tolist() == [3, 1, 4]


def test_only_ends_of_lines_cut_a_file(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    (tmp_path / "a.jsonl").write_text(
        f'\ufeff{json.dumps({"text": text}, ensure_ascii=False)}\r\n{{"text": "b"}}', encoding="utf-8"
    )
    (tmp_path / "a.txt").write_text(f"{text}\r\nb\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == read_prompts(tmp_path / "a.txt") == [text, "b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"a": "x", "b": "y"}', "has columns a, b; name one"),
        ("a.jsonl:c", '{"a": "x"}', "line 1 of .* has no 'c'; it has a"),
        ("a.jsonl", '{"a": "x"}\n{"b": "x"}', "line 2 of .* has no 'a'"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "line 2 of .* its 'text' is a int"),
        ("a.jsonl", '"x"\nnothing', "line 2 is no JSON"),
        ("a.jsonl", '{"n": 1}', "has no column of texts"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.txt:text", "x", "names a column, but only .jsonl files have columns"),
        ("other.txt", "", "no such file"),
        ("a.jsonl", f"[3, {2**63}]", f"line 1 of .* has the token id {2**63}, which is in no vocabulary"),
        ("a.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl:foo", "[1, 2]", "line 1 of .* is a list without columns; leave out :foo"),
        ("a.jsonl:foo", '{"foo": "x"}\n"x"', "line 2 of .* is a str without columns"),
    ],
)
def test_what_cannot_be_read_says_why(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / ("a.txt" if name == "other.txt" else name.partition(":")[0])).write_text(content, encoding="utf-8")
    with pytest.raises(LoopedError, match=says):
        read_prompts(f"{tmp_path}/{name}")


def test_a_data_set_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    jsonl(tmp_path / "set" / "test.jsonl", ROWS[:2])
    assert read_prompts(f"{tmp_path}/set") == ["q0", "q1"]
    assert read_prompts(f"{tmp_path}/set:train:answer", n=3) == ["a0", "a1", "a2"]
    with pytest.raises(LoopedError, match=r"has the splits .*train"):
        read_prompts(f"{tmp_path}/set:dev")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(read_prompts(str(tmp_path / "saved"))) == 6
    with pytest.raises(LoopedError, match="cannot be read as a data set"):
        read_prompts("no/such-data-set")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text("nothing")
    with pytest.raises(LoopedError, match=r"as a data set: JSON parse error.*\. Check"):  # and not only that it failed
        read_prompts(f"{tmp_path}/bad")
