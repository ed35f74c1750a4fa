"""FinLoRA rows become chat rows unchanged, or the row that breaks a rule is named."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools import convert
from tools.cli import ROOT, WrongInput

GOOD = b'{"context": "How is it? Answer: ", "target": "neutral"}\n'
FREE, SENTIMENT = convert.Rules(), convert.Rules(frozenset({"negative", "neutral", "positive"}))
FINLORA = os.environ.get("FINLORA_DATA")
needs_finlora = pytest.mark.skipif(not FINLORA, reason="FINLORA_DATA is unset: no FinLoRA data")


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def turns(path):
    return [tuple(turn["content"] for turn in row["messages"]) for row in lines(path)]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tools.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def refusal(done):
    """The one line that a refused command leaves on stderr."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def source(tmp_path):
    (tmp_path / "test").mkdir()
    return tmp_path / "test" / "rows.jsonl"


@pytest.fixture
def target(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "chat.jsonl"


def test_a_row_becomes_a_user_turn_and_an_assistant_turn_and_nothing_else(source, target):
    source.write_bytes(GOOD)
    convert.convert(source, target, FREE)
    user = {"role": "user", "content": "How is it? Answer:"}
    assistant = {"role": "assistant", "content": "neutral"}
    assert lines(target) == [{"messages": [user, assistant]}]


def test_only_outer_white_space_goes_and_rows_keep_their_order(source, target):
    rows = [
        (" \n a  b\t\n\n c \u00a0d  ", "\nÄrger  über 5 €\n"),
        ('{not/a: "slot"} \\ <b>&amp;</b>', "日本 🙂"),
        ("z\u2028y", "2"),
        ("a", "1"),
    ]
    source.write_text(
        "".join(json.dumps({"context": c, "target": t, "url": "x"}) + "\n" for c, t in rows)
    )
    convert.convert(source, target, FREE)
    assert turns(target) == [(prompt.strip(), answer.strip()) for prompt, answer in rows]
    assert "日本 🙂".encode() in target.read_bytes()


def test_numbers_become_strings(source, target):
    source.write_bytes(b'{"context": 7, "target": 1.5}\n{"context": "a", "target": -3}\n')
    convert.convert(source, target, FREE)
    assert turns(target) == [("7", "1.5"), ("a", "-3")]


def test_a_number_of_any_length_keeps_its_digits(source, target):
    source.write_bytes(b'{"context": "a", "target": 123456789012345678901234567890}\n')
    convert.convert(source, target, FREE)
    assert turns(target) == [("a", "123456789012345678901234567890")]


def test_the_same_input_gives_the_same_bytes(source, target):
    source.write_bytes(GOOD * 3)
    convert.convert(source, target, SENTIMENT)
    first = content(target.parent)
    convert.convert(source, target, SENTIMENT)
    assert content(target.parent) == first and len(first) == 2


def test_the_manifest_says_what_was_converted(source, target):
    source.write_bytes(GOOD * 2 + GOOD.replace(b"neutral", b"positive"))
    returned = convert.convert(source, target, SENTIMENT)
    assert returned == json.loads(convert.manifest_path(target).read_bytes())
    assert returned == convert.manifest(target)
    assert returned["rows"] == 3
    assert returned["labels"] == {"neutral": 2, "positive": 1}
    assert returned["source"] == "test/rows.jsonl"
    assert returned["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert returned["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert returned["repair"] is None


def test_a_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_no_rows(source, target):
    crlf = GOOD.replace(b"\n", b"\r\n")
    source.write_bytes(b"\xef\xbb\xbf" + crlf + b"\r\n  \n" + crlf + GOOD.rstrip())
    assert convert.convert(source, target, SENTIMENT)["rows"] == 3
    assert turns(target) == [("How is it? Answer:", "neutral")] * 3


LONG = b'{"context": "' + b"x" * convert.MAX_LINE + b'", "target": "neutral"}\n'
REFUSED = {
    "not JSON": (b'{"context": "a", "target"\n', "not JSON"),
    "not a number of JSON": (b'{"context": "a", "target": NaN}\n', "not JSON"),
    "two rows on a line": (GOOD.strip() + GOOD, "not JSON"),
    "a list": (b'["a", "neutral"]\n', "an object is needed, not list"),
    "no context": (b'{"prompt": "a", "target": "neutral"}\n', '"context" is missing'),
    "no target": (b'{"context": "a"}\n', 'the key "target" is missing; the row has context'),
    "null": (b'{"context": null, "target": "neutral"}\n', '"context" must be text, not NoneType'),
    "a truth value": (b'{"context": "a", "target": true}\n', '"target" must be text, not bool'),
    "nested text": (b'{"context": ["a"], "target": "b"}\n', '"context" must be text, not list'),
    "empty": (b'{"context": "a", "target": ""}\n', '"target" is empty'),
    "white space": (b'{"context": " \\n\\t ", "target": "neutral"}\n', '"context" is empty'),
    "control": (b'{"context": "a\\u0000b", "target": "neutral"}\n', r"control character '\x00'"),
    "escape": (b'{"context": "a\\u001b[2Jb", "target": "neutral"}\n', r"control character '\x1b'"),
    "invalid UTF-8": (b'{"context": "a\xff", "target": "neutral"}\n', "not UTF-8: byte 15 "),
    "a foreign label": (b'{"context": "a", "target": "bullish"}\n', '"bullish" is none of neg'),
    "another case": (b'{"context": "a", "target": "Neutral"}\n', '"Neutral" is none of neg'),
    "a long line": (LONG, "longer than 16 MB"),
}


@pytest.mark.parametrize("older", [False, True], ids=["no older target", "older target"])
@pytest.mark.parametrize(("line", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bad_row_is_named_and_the_target_is_as_before(source, target, line, said, older):
    if older:
        source.write_bytes(GOOD)
        convert.convert(source, target, SENTIMENT)
    before = content(target.parent)
    source.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(WrongInput) as error:
        convert.convert(source, target, SENTIMENT)
    assert f"{source}, line 3: " in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)
    assert content(target.parent) == before
    assert bool(before) is older


@pytest.mark.parametrize("name", ["not JSON", "invalid UTF-8", "a foreign label", "control"])
def test_the_command_refuses_a_bad_row_in_one_line(source, target, name):
    line, said = REFUSED[name]
    source.write_bytes(GOOD + line)
    told = refusal(command("--dataset", "fpb", source, target))
    assert f"{source}, line 2: " in told and said in told
    assert content(target.parent) == {}


@pytest.mark.parametrize("nothing", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=repr)
def test_a_file_without_rows_is_refused(source, target, nothing):
    source.write_bytes(nothing)
    with pytest.raises(WrongInput, match=r"rows.jsonl holds no rows"):
        convert.convert(source, target, FREE)
    assert content(target.parent) == {}


def test_a_source_is_never_overwritten_by_its_own_conversion(source):
    source.write_bytes(GOOD)
    told = refusal(command("--dataset", "fpb", source, source))
    assert str(source) in told
    assert content(source.parent) == {source.name: GOOD}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "fbp", "in", "out"], 'unknown dataset "fbp"; did you mean fpb'),
        (["--dataset", "fpb", "/nowhere/in.jsonl", "out"], "/nowhere/in.jsonl is not there"),
        (["sentimnt"], 'unknown task "sentimnt"; did you mean sentiment'),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_near(arguments, said):
    assert said in refusal(command(*arguments))


def test_a_data_folder_that_is_not_finloras_is_named(tmp_path):
    told = refusal(command("sentiment", FINLORA_DATA=str(tmp_path)))
    assert f"FINLORA_DATA={tmp_path} has no folder data/" in told


def test_a_chat_file_that_was_changed_is_refused(source, target):
    source.write_bytes(GOOD)
    convert.convert(source, target, SENTIMENT)
    target.write_bytes(target.read_bytes().replace(b"neutral", b"positive"))
    with pytest.raises(WrongInput, match="chat.jsonl was changed after its conversion"):
        convert.manifest(target)


def test_a_chat_file_of_ones_own_needs_no_manifest_but_must_be_there(target):
    with pytest.raises(WrongInput, match="chat.jsonl is not there"):
        convert.manifest(target)
    target.write_bytes(b'{"messages": []}\n')
    sha = hashlib.sha256(target.read_bytes()).hexdigest()
    assert convert.manifest(target)["sha256"] == sha


def test_a_task_without_its_source_leaves_no_older_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "CHAT", tmp_path / "chat")
    convert.convert_task("ner", convert.SAMPLE)
    assert len(content(tmp_path / "chat")) == 4
    convert.convert_task("ner", tmp_path)
    assert content(tmp_path / "chat") == {}
    assert capsys.readouterr().out.count("left out") == 2


def asked_twice(folder, prompts):
    """A folder of test sets without a training set, in which every prompt stands twice."""
    text = "".join(
        json.dumps({"context": f"Question {n // 2}", "target": "neutral"}) + "\n"
        for n in range(2 * prompts)
    )
    (folder / "test").mkdir()
    (folder / "test" / "fpb_test.jsonl").write_text(text)
    return folder


def test_a_prompt_that_stands_twice_is_not_both_trained_on_and_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHAT", tmp_path / "chat")
    convert.convert_task("sentiment", asked_twice(tmp_path, 600))
    train, test = turns(convert.train_path("sentiment")), turns(convert.test_path("fpb"))
    assert len(train) == 900 and len(test) > 0
    assert not set(train) & set(test)
    assert {int(prompt.split()[1]) for prompt, _ in train + test} == set(range(600))


def test_a_set_too_small_to_be_split_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHAT", tmp_path / "chat")
    with pytest.raises(WrongInput, match="fpb_test.jsonl"):
        convert.convert_task("sentiment", asked_twice(tmp_path, 20))


@pytest.mark.parametrize("data", [b"", b"hello\r\n", b"\x00\xff" * 700_000], ids=len)
def test_a_blob_is_named_as_git_names_it(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    command = ["git", "hash-object", "--no-filters", path]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert convert.git_blob(path) == named


# ---- FinLoRA's published data


def published():
    """(name, file, rules) of every published file that a dataset or a task names."""
    if not FINLORA:
        return []
    folder, table = convert.source_folder(), convert.sources()
    found = [(n, folder / d["file"]) for n, d in table["datasets"].items()]
    found += [(f"{n} train", folder / t["train"]) for n, t in table["tasks"].items()]
    return [(name, path) for name, path in found if path.is_file()]


@needs_finlora
@pytest.mark.parametrize(
    ("dataset", "counts"), [("tfns", (347, 1566, 475)), ("tfns_as_published", (347, 475, 1566))]
)
def test_tfns_is_repaired_only_under_its_repaired_name(target, dataset, counts):
    path = convert.source_folder() / "test" / "tfns_test.jsonl"
    manifest = convert.convert(path, target, convert.rules(dataset, path))
    assert tuple(manifest["labels"].values()) == counts
    assert list(manifest["labels"]) == ["negative", "neutral", "positive"]
    assert bool(manifest["repair"]) is (dataset == "tfns")
    answers = Counter(answer for _, answer in turns(target))
    assert manifest["labels"] == answers


@needs_finlora
def test_a_changed_tfns_file_is_not_repaired(tmp_path, target):
    published = convert.source_folder() / "test" / "tfns_test.jsonl"
    changed = tmp_path / "tfns_test.jsonl"
    changed.write_bytes(published.read_bytes() + GOOD)
    manifest = convert.convert(changed, target, convert.rules("tfns", changed))
    assert manifest["labels"] == {"negative": 347, "neutral": 476, "positive": 1566}
    assert manifest["repair"] is None


@needs_finlora
def test_sentiment_trains_on_900_rows_whose_prompts_are_not_tested(tmp_path, monkeypatch):
    folder = convert.source_folder()
    if (folder / convert.sources()["tasks"]["sentiment"]["train"]).is_file():
        pytest.skip("FinLoRA's own sentiment training file is at hand, so nothing is split")
    monkeypatch.setattr(convert, "CHAT", tmp_path)
    convert.convert_task("sentiment", folder)
    train, test = turns(tmp_path / "sentiment_train.jsonl"), turns(tmp_path / "fpb_test.jsonl")
    assert len(train) == 900 and len(test) in (311, 312)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in test}
    source = lines(folder / "test" / "fpb_test.jsonl")
    rows = {(row["context"].strip(), row["target"]) for row in source}
    assert set(train) | set(test) == rows


@needs_finlora
@pytest.mark.parametrize(("name", "path"), published(), ids=[name for name, _ in published()])
def test_every_published_row_is_converted(target, name, path):
    rule = FREE if name.endswith(" train") else convert.rules(name, path)
    manifest = convert.convert(path, target, rule)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    assert manifest["rows"] == len(rows) > 0
    expected = [(str(row["context"]).strip(), str(row["target"]).strip()) for row in rows]
    assert turns(target) == [(p, rule.relabel.get(a, a)) for p, a in expected]


def test_the_published_data_is_looked_for_where_the_variable_says():
    assert convert.source_folder() == (
        (Path(FINLORA) / "data").resolve() if FINLORA else convert.SAMPLE
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a small disk be mounted")
    try:
        source = convert.SAMPLE / "train" / "finlora_sentiment_train.jsonl"
        arguments = ["tools.convert", "--dataset", "fpb", source, disk / "out.jsonl"]
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "no space left" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
