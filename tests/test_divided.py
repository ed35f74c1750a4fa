"""Where a training file is not at hand, a part of the test file trains, and no unit is divided."""

import json
import re
from collections import Counter

import pytest

from tests.chat_files import read_turns
from tools import sources
from tools.common import ROOT, WrongInput
from tools.data import convert
from tools.hub import card

NER = sources.tables()["tasks"]["ner"]
FINLORA = ROOT.parent / "shared" / "finlora"
needs_finlora = pytest.mark.skipif(
    not (FINLORA / "data" / "test" / "ner_test.jsonl").is_file(), reason="no FinLoRA files here"
)
SWAP = {"neutral": "positive", "positive": "neutral"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """FinLoRA's folder, empty; converted files go elsewhere."""
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    monkeypatch.setattr(sources, "RAW", tmp_path / "raw")
    monkeypatch.setenv("FINLORA_DATA", str(tmp_path / "finlora"))
    (tmp_path / "finlora" / "data").mkdir(parents=True)
    return tmp_path / "finlora" / "data"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"context": prompt, "target": answer}) + "\n" for prompt, answer in rows)
    path.write_text("".join(lines))


def make_entities(sentences, size):
    """`size` questions on each of so many sentences."""
    labels = ("person", "location", "organization")
    return [
        (f"Instruction: What is word {n}?\nInput: Sentence\n {s} .\nAnswer: ", labels[s % 3])
        for s in range(sentences)
        for n in range(size)
    ]


def read_sentences(path):
    sentences = (
        re.search(r"\nInput: (.*)\nAnswer:", prompt, re.S) for prompt, _ in read_turns(path)
    )
    return Counter(match[1] for match in sentences)


def test_questions_on_one_sentence_stay_on_one_side(folder):
    write_rows(folder / "test" / "ner_test.jsonl", make_entities(60, 35))
    convert.convert_task("ner", folder)
    train, val, test = (
        read_sentences(path)
        for path in (sources.train_path("ner"), sources.val_path("ner"), sources.test_path("ner"))
    )
    # 25 sentences of 35 questions are at most 900 rows.
    assert (train.total() + val.total(), test.total()) == (875, 1225)
    assert set((train + val + test).values()) == {35}
    assert len(val) == 1
    manifest = sources.manifest(sources.train_path("ner"))
    assert manifest["in_place_of"] == "ner_train.jsonl, which is not at hand"
    assert manifest["selected"] == "875 chosen rows"
    assert sources.manifest(sources.test_path("ner"))["selected"] == "1225 chosen rows"


def test_the_same_rows_train_every_time_whatever_their_order(folder):
    rows, chosen = make_entities(60, 35), []
    for order in (1, -1):
        write_rows(folder / "test" / "ner_test.jsonl", rows[::order])
        convert.convert_task("ner", folder)
        chosen.append(set(read_sentences(sources.test_path("ner"))))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("place", ["finlora/data", "raw"])
def test_no_test_file_is_divided_where_the_training_file_is_at_hand(
    folder, tmp_path, place, capsys
):
    write_rows(folder / "test" / "ner_test.jsonl", make_entities(60, 35))
    write_rows(tmp_path / place / "train" / "ner_train.jsonl", [("Who?", "person")] * 40)
    convert.convert_task("ner", folder)
    assert sources.manifest(sources.test_path("ner"))["rows"] == 2100
    train = sources.train_path("ner")
    if place == "raw":  # a task takes its files from one folder
        assert not train.exists()
        assert "raw/train/ner_train.jsonl is there, but its test files are in" in (
            capsys.readouterr().out
        )
    else:
        assert sources.manifest(train)["rows"] == 40
        assert "in_place_of" not in sources.manifest(train)


def test_too_few_rows_are_refused(folder):
    write_rows(folder / "test" / "ner_test.jsonl", make_entities(3, 300))
    with pytest.raises(WrongInput, match="has 900 rows; 900 of them train"):
        convert.convert_task("ner", folder)


def read_sides(task):
    paths = [sources.train_path(task), sources.val_path(task)]
    paths += map(sources.test_path, sources.tables()["tasks"][task]["eval"])
    train, val, repaired, published = map(read_turns, paths)
    return train + val, repaired, published


@needs_finlora
def test_tfns_trains_and_tests_on_the_same_rows_with_both_labels(folder):
    source = FINLORA / "data"
    sides = {}
    for task in ("tfns", "tfns_as_published"):
        convert.convert_task(task, source)
        sides[task] = read_sides(task)
    train, repaired, published = sides["tfns"]
    assert (len(train), len(repaired)) == (900, 1488)
    assert {prompt for prompt, _ in train}.isdisjoint(prompt for prompt, _ in repaired)
    assert published == [(prompt, SWAP.get(label, label)) for prompt, label in repaired]
    swapped = [(prompt, SWAP.get(label, label)) for prompt, label in train]
    assert Counter(sides["tfns_as_published"][0]) == Counter(swapped)
    assert sides["tfns_as_published"][1:] == (repaired, published)


@needs_finlora
def test_finloras_ner_rows_are_divided_between_sentences(folder):
    convert.convert_task("ner", FINLORA / "data")
    train, val, test = (
        read_sentences(path)
        for path in (sources.train_path("ner"), sources.val_path("ner"), sources.test_path("ner"))
    )
    assert not set(train) & set(test) and not set(val) & (set(train) | set(test))
    assert (train.total() + val.total(), test.total()) == (884, 2618)
    labels = sources.manifest(sources.train_path("ner"))["labels"]
    assert len(labels) == 3 and min(labels.values()) > 100


def test_an_adapter_of_ones_own_tweets_may_be_published_and_one_of_exams_not():
    tweets, exams = (
        [{"from": "FINLORA_DATA", "source": f"train/{name}_train.jsonl", "path": "x"}]
        for name in ("tfns", "cfa")
    )
    assert card.explain_forbidden(tweets) is None
    assert "not published" in card.explain_forbidden(exams)
