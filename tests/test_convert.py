"""FinLoRA rows become chat rows unchanged, or the row that breaks a rule is named."""

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.chat_files import read_turns, write_rows
from tests.conftest import call, run
from tools import common, sources
from tools.common import ROOT, WrongInput, unique
from tools.data import bases, convert, join, lengths, rows, turns
from tools.data.chatfile import Options, convert_rows
from tools.data.rows import MAX_LINE, Rules
from tools.data.rules import REMOVALS, load_test_rules

GOOD = b'{"context": "How is it? Answer: ", "target": "neutral"}\n'
FREE, SENTIMENT = Rules(), Rules(frozenset({"negative", "neutral", "positive"}))
FINLORA = os.environ.get("FINLORA_DATA")
needs_finlora = pytest.mark.skipif(not FINLORA, reason="FINLORA_DATA is unset: no FinLoRA data")


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


@pytest.fixture
def chat(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    return tmp_path / "chat"


def test_a_row_becomes_a_user_turn_and_an_assistant_turn_and_nothing_else(source, target):
    source.write_bytes(GOOD)
    convert_rows(source, target, FREE)
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
    convert_rows(source, target, FREE)
    assert read_turns(target) == [(prompt.strip(), answer.strip()) for prompt, answer in rows]
    assert "日本 🙂".encode() in target.read_bytes()


def test_numbers_become_strings_of_all_their_digits(source, target):
    long_row = b'{"context": "a", "target": 123456789012345678901234567890}\n'
    source.write_bytes(
        b'{"context": 7, "target": 1.5}\n{"context": "a", "target": -3}\n' + long_row
    )
    convert_rows(source, target, FREE)
    assert read_turns(target) == [
        ("7", "1.5"),
        ("a", "-3"),
        ("a", "123456789012345678901234567890"),
    ]


def test_the_manifest_says_what_was_converted_and_the_same_input_gives_the_same_bytes(
    source, target
):
    source.write_bytes(GOOD * 2 + GOOD.replace(b"neutral", b"positive"))
    returned = convert_rows(source, target, SENTIMENT)
    assert returned == json.loads(sources.manifest_path(target).read_bytes())
    assert returned == sources.manifest(target)
    assert returned["rows"] == 3 and returned["repair"] is None
    assert returned["labels"] == {"neutral": 2, "positive": 1}
    assert returned["source"] == "test/rows.jsonl"
    for path, key in ((source, "source_sha256"), (target, "sha256")):
        assert returned[key] == hashlib.sha256(path.read_bytes()).hexdigest()
    first = content(target.parent)
    convert_rows(source, target, SENTIMENT)
    assert content(target.parent) == first and len(first) == 2


def test_a_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline_are_no_rows(source, target):
    crlf = GOOD.replace(b"\n", b"\r\n")
    source.write_bytes(b"\xef\xbb\xbf" + crlf + b"\r\n  \n" + crlf + GOOD.rstrip())
    assert convert_rows(source, target, SENTIMENT)["rows"] == 3
    assert read_turns(target) == [("How is it? Answer:", "neutral")] * 3


LONG = b'{"context": "' + b"x" * MAX_LINE + b'", "target": "neutral"}\n'
REFUSED = {
    "not JSON": (b'{"context": "a", "target"\n', "not JSON"),
    "not a number of JSON": (b'{"context": "a", "target": NaN}\n', "not JSON"),
    "two rows on a line": (GOOD.strip() + GOOD, "not JSON"),
    "a list": (b'["a", "neutral"]\n', "an object is needed, not list"),
    "no context": (b'{"prompt": "a", "target": "neutral"}\n', '"context" is missing'),
    "no target": (b'{"context": "a"}\n', 'the key "target" is missing; the row has context'),
    "null": (b'{"context": null, "target": "neutral"}\n', '"context" must be text, not NoneType'),
    "no answer": (b'{"context": "a", "target": null}\n', '"target" must be text, not NoneType'),
    "infinite": (b'{"context": "a", "target": 1e999}\n', "not JSON"),
    "a key twice": (
        b'{"target": "x", "context": "a", "target": "neutral"}\n',
        'the key "target" is repeated',
    ),
    "a key spelt twice": (
        b'{"context": "a \\u0022\\u0022", "target": "neutral", "t\\u0061rget": "neutral"}\n',
        'the key "target" is repeated',
    ),
    "a key twice between escapes": (
        b'{"context": "a\\\\", "target": 1, "target": "b\\\\"}\n',
        'the key "target" is repeated',
    ),
    "another key twice": (
        b'{"context": "a", "target": "neutral", "pages": [{"n": 1, "n": 2}]}\n',
        'the key "n" is repeated',
    ),
    "half a character": (b'{"context": "\\ud83d", "target": "neutral"}\n', "not JSON"),
    "a truth value": (b'{"context": "a", "target": true}\n', '"target" must be text, not bool'),
    "nested text": (b'{"context": ["a"], "target": "b"}\n', '"context" must be text, not list'),
    "empty": (b'{"context": "a", "target": ""}\n', '"target" is empty'),
    "white space": (b'{"context": " \\n\\t ", "target": "neutral"}\n', '"context" is empty'),
    "control": (b'{"context": "a\\u0000b", "target": "neutral"}\n', r"control character '\x00'"),
    "delete": (b'{"context": "a\x7fb", "target": "neutral"}\n', r"control character '\x7f'"),
    "delete, spelt": (b'{"context": "a\\u007Fb", "target": "neutral"}\n', r"character '\x7f'"),
    "backspace": (b'{"context": "a\\b", "target": "neutral"}\n', r"control character '\x08'"),
    "raw control": (b'{"context": "a\x01b", "target": "neutral"}\n', "not JSON"),
    "escape": (b'{"context": "a\\u001b[2Jb", "target": "neutral"}\n', r"control character '\x1b'"),
    "invalid UTF-8": (b'{"context": "a\xff", "target": "neutral"}\n', "not UTF-8: byte 15 "),
    "a foreign label": (b'{"context": "a", "target": "bullish"}\n', '"bullish" is none of neg'),
    "another case": (b'{"context": "a", "target": "Neutral"}\n', '"Neutral" is none of neg'),
    "a long line": (LONG, "longer than 16 MB"),
}


@pytest.mark.parametrize("older", [False, True], ids=["no older target", "older target"])
@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_row_is_named_and_the_target_is_as_before(source, target, line, message, older):
    if older:
        source.write_bytes(GOOD)
        convert_rows(source, target, SENTIMENT)
    before = content(target.parent)
    source.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(WrongInput) as error:
        convert_rows(source, target, SENTIMENT)
    assert f"{source}, line 3: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)
    assert content(target.parent) == before
    assert bool(before) is older


@pytest.mark.parametrize("name", ["not JSON", "invalid UTF-8", "a foreign label", "control"])
def test_the_command_refuses_a_bad_row_in_one_line(source, target, name):
    line, message = REFUSED[name]
    source.write_bytes(GOOD + line)
    error = refusal(run("convert", "fpb", source, target))
    assert f"{source}, line 2: " in error and message in error
    assert content(target.parent) == {}


@pytest.mark.parametrize("nothing", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=repr)
def test_a_file_without_rows_is_refused(source, target, nothing):
    source.write_bytes(nothing)
    with pytest.raises(WrongInput, match=r"rows.jsonl holds no rows"):
        convert_rows(source, target, FREE)
    assert content(target.parent) == {}


def test_a_source_is_never_overwritten_by_its_own_conversion(source):
    source.write_bytes(GOOD)
    error = refusal(run("convert", "fpb", source, source))
    assert str(source) in error
    assert content(source.parent) == {source.name: GOOD}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "fbp", "in", "out"], 'unknown dataset "fbp"; did you mean fpb'),
        (["convert", "fpb", "/nowhere/in.jsonl", "out"], "/nowhere/in.jsonl is not there"),
        (["data", "sentimnt"], 'unknown task "sentimnt"; did you mean sentiment'),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_near(arguments, message):
    assert message in refusal(run(*arguments))


def test_a_data_folder_that_is_not_finloras_is_named(tmp_path):
    error = refusal(run("data", "sentiment", FINLORA_DATA=str(tmp_path)))
    assert f"FINLORA_DATA={tmp_path} has no folder data/" in error


def test_a_chat_file_must_be_there_and_unchanged_and_needs_no_manifest(source, target):
    with pytest.raises(WrongInput, match="chat.jsonl is not there"):
        sources.manifest(target)
    target.write_bytes(b'{"messages": []}\n')
    assert sources.manifest(target)["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    source.write_bytes(GOOD)
    convert_rows(source, target, SENTIMENT)
    target.write_bytes(target.read_bytes().replace(b"neutral", b"positive"))
    with pytest.raises(WrongInput, match="chat.jsonl was changed after its conversion"):
        sources.manifest(target)


def test_a_task_without_its_source_leaves_no_older_rows(tmp_path, chat, capsys):
    convert.convert_task("ner", sources.SAMPLE)
    assert len(content(chat)) == 6
    convert.convert_task("ner", tmp_path)
    assert content(chat) == {}
    assert capsys.readouterr().out.count("left out") == 2


def write_twice(folder, prompts):
    """A folder of test sets without a training set, in which every prompt occurs twice."""
    pairs = [(f"Question {n // 2}", "neutral") for n in range(2 * prompts)]
    write_rows(folder / "test" / "fpb_test.jsonl", pairs)
    return folder


def test_a_prompt_that_stands_twice_is_not_both_trained_on_and_tested(tmp_path, chat):
    convert.convert_task("sentiment", write_twice(tmp_path, 600))
    train, test = read_turns(sources.train_path("sentiment")), read_turns(sources.test_path("fpb"))
    assert len(train) == 882 and len(test) > 0
    train += read_turns(sources.val_path("sentiment"))
    assert len(train) == 900
    assert not set(train) & set(test)
    assert {int(prompt.split()[1]) for prompt, _ in train + test} == set(range(600))


def test_a_bad_row_does_not_keep_a_set_from_being_split_where_such_rows_are_kept_aside(
    tmp_path, chat
):
    folder = write_twice(tmp_path, 600)
    with open(folder / "test" / "fpb_test.jsonl", "ab") as file:
        file.write(REFUSED["null"][0])
    with pytest.raises(WrongInput, match="fpb_test.jsonl, line 1201"):
        convert.convert_task("sentiment", folder)
    convert.convert_task("sentiment", folder, Options(quarantine=True))
    assert sources.manifest(sources.train_path("sentiment"))["rows"] == 882
    assert sources.manifest(sources.test_path("fpb"))["refused"] == 1


def test_a_set_too_small_to_be_split_is_named(tmp_path, chat):
    with pytest.raises(WrongInput, match="fpb_test.jsonl"):
        convert.convert_task("sentiment", write_twice(tmp_path, 20))


@pytest.mark.parametrize("data", [b"", b"hello\r\n", b"\x00\xff" * 700_000], ids=len)
def test_a_blob_is_named_as_git_names_it(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    command = ["git", "hash-object", "--no-filters", path]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert common.git_blob(path) == named


# ---- Blocks of rows


PIECES = [*'ab \n\t"/{}:,0é–🙂', "u0022", "us"] * 8
PIECES += [*"\\\x7f\x01\x08\x0c", "\\u0022", '\\"', "\\b"]
KEYS = ["context", "target"] * 4 + ["url", "context "]


def nasty_line(draw):
    """A line that is a row, or nearly one: odd keys, keys twice, every way to spell a character."""

    def spelt(text):
        if text.isascii() and draw.random() < 0.05:
            return "".join(f"\\u{ord(character):04x}" for character in text)
        return json.dumps(text, ensure_ascii=draw.random() < 0.5)[1:-1]

    def value():
        if draw.random() < 0.03:
            return draw.choice(["1", "null", "[]", "true", "{}", '{"a": 1}'])
        return f'"{spelt("".join(draw.choices(PIECES, k=draw.randint(0, 9))))}"'

    keys = draw.choices(KEYS, k=1) if draw.random() < 0.03 else ["context", "target"]
    keys += draw.choices(KEYS, k=1) if draw.random() < 0.1 else []
    inside = ", ".join(f'"{spelt(key)}": {value()}' for key in keys)
    return (f"{{{inside}}}" + draw.choice(["", "", "\r", " "])).encode()


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_block_are_those_that_a_strict_parser_reads(seed):
    draw, taken = random.Random(seed), 0
    for _ in range(2000):
        lines = [nasty_line(draw) for _ in range(draw.randint(1, 2))]
        batch = rows.parse_block(Path("rows.jsonl"), 1, b"\n".join(lines), FREE)
        refused = {number for number, _, _ in batch.refused}
        parsed = dict(
            zip(batch.numbers, zip(batch.prompts, batch.answers, strict=True), strict=True)
        )
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line, object_pairs_hook=unique)
                texts = [rows.read_text(row, key) for key in ("context", "target")]
                texts = [text.replace("\x0c", "\n").strip() for text in texts]
                assert all(texts)
            except (ValueError, AssertionError):
                assert number in refused, line
                continue
            assert parsed[number] == tuple(texts), line
            taken += 1
    assert taken > 500


def test_a_repeated_key_is_refused_beside_a_row_that_lacks_it(source, target):
    source.write_bytes(GOOD + b'{"context": "a"}\n{"context": "a", "target": "b", "target": "c"}\n')
    convert_rows(source, target, options=Options(quarantine=True))
    assert read_turns(target) == [("How is it? Answer:", "neutral")]


def test_the_size_of_a_block_and_the_number_of_cores_change_no_byte(source, target, monkeypatch):
    draw = random.Random(0)
    text = [
        json.dumps({"context": "é\n" * draw.randint(1, 90), "target": "up"}) for _ in range(300)
    ]
    source.write_text("\ufeff" + "\r\n".join([*text[:150], "", '{"context": 1}', *text[150:]]))
    cores, results = os.sched_getaffinity(0), []
    try:
        for size, used in [(rows.CHUNK, cores), (100, cores), (1, {min(cores)})]:
            monkeypatch.setattr(rows, "CHUNK", size)
            os.sched_setaffinity(0, used)
            convert_rows(source, target, FREE, options=Options(quarantine=True))
            results.append(content(target.parent))
    finally:
        os.sched_setaffinity(0, cores)
    assert results[0] == results[1] == results[2]
    assert json.loads(sources.refused_path(target).read_text())["line"] == 152


PEAK = """
import sys
from pathlib import Path
from tools.data.chatfile import Options, convert_rows
convert_rows(Path(sys.argv[1]), Path(sys.argv[2]), options=Options(quarantine=True))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak(source, target):
    """MB of memory that a process needed to convert a file."""
    command = [sys.executable, "-c", PEAK, str(source), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def test_memory_does_not_grow_with_the_file(source, target):
    source.write_bytes(GOOD * 10)
    small = peak(source, target)
    source.write_bytes(GOOD * (40_000_000 // len(GOOD)))
    assert peak(source, target) < small + 20


def test_a_line_of_50_mb_is_refused_in_little_memory_and_the_rows_around_it_are_kept(
    source, target
):
    source.write_bytes(GOOD + b'{"context": "' + b"x" * 50_000_000 + b'"}\n' + GOOD)
    assert peak(source, target) < 300
    manifest = sources.manifest(target)
    assert (manifest["rows_in"], manifest["rows"], manifest["refused"]) == (3, 2, 1)
    refused = json.loads(sources.refused_path(target).read_text())
    assert (refused["line"], refused["only_first_bytes"]) == (2, 1000)
    assert "longer than 16 MB" in refused["reason"] and len(refused["text"]) == 1000


# ---- Quarantine


def test_refused_rows_are_kept_beside_the_output_and_every_row_is_accounted_for(source, target):
    bad = [line for line, _ in REFUSED.values() if line != LONG]
    source.write_bytes(GOOD + b"".join(bad) + b"\n" + GOOD)
    manifest = convert_rows(source, target, SENTIMENT, options=Options(quarantine=True))
    assert manifest["rows_in"] == len(bad) + 2
    assert (manifest["rows"], manifest["refused"]) == (2, len(bad)) == (2, manifest["rows_in"] - 2)
    refused = lines(sources.refused_path(target))
    assert [row["line"] for row in refused] == list(range(2, len(bad) + 2))
    for row, (name, (line, message)) in zip(refused, REFUSED.items(), strict=False):
        assert message in row["reason"] and row["file"] == source.name, name
        raw = row["text"].encode() if "text" in row else base64.b64decode(row["base64"])
        assert raw == line.removesuffix(b"\n"), name
    source.write_bytes(GOOD)
    convert_rows(source, target, SENTIMENT)
    assert not sources.refused_path(target).exists()


def test_the_command_keeps_refused_rows_only_where_it_is_told_to(source, target):
    source.write_bytes(GOOD + REFUSED["null"][0])
    convert_it = ("convert", "fpb", source, target)
    done = run(*convert_it, "--on-error", "quarantine")
    assert done.returncode == 0, done.stderr
    assert f"1 refused: {sources.refused_path(target)}" in done.stdout
    for option in ([], ["--on-error", "stop"]):
        message = refusal(run(*convert_it, *option, ON_ERROR="quarantine"))
        assert f"{source}, line 2: " in message
    error = refusal(run(*convert_it, "--on-error", "skip"))
    assert "ON_ERROR: 'skip' is not one of 'stop', 'quarantine'" in error


def test_a_file_of_which_no_row_can_be_used_is_refused_even_so(source, target):
    source.write_bytes(REFUSED["null"][0] * 2)
    with pytest.raises(WrongInput, match=r'no rows that can be used; the first, line 1: "context"'):
        convert_rows(source, target, FREE, options=Options(quarantine=True))
    assert content(target.parent) == {}


# ---- Repairs of training sets


def test_leaked_repeated_and_broken_rows_leave_the_training_set_and_stay_in_the_test(
    tmp_path, chat, capsys
):
    question = "Explain this term in one sentence: {}. Answer:"
    test = [(question.format(term), "is") for term in ("Domain Member", "fact")]
    train = [
        (question.format(t), f"{n}") for n, t in enumerate(("a", "nan", "domain  member", "a", "A"))
    ]
    train.append((question.format("b"), "nan"))
    write_rows(tmp_path / "test" / "xbrl_term_test.jsonl", test)
    write_rows(tmp_path / "train" / "xbrl_term_train.jsonl", train)
    convert.convert_task("xbrl_term", tmp_path)
    assert read_turns(sources.train_path("xbrl_term")) == [train[0], train[4]]
    assert read_turns(sources.test_path("xbrl_term")) == test
    manifest = sources.manifest(sources.train_path("xbrl_term"))
    assert (manifest["rows_in"], manifest["rows"]) == (6, 2)
    removed = [entry["rows"] for entry in manifest["removed"]]
    assert removed == [1, 1, 1, 1]
    assert all(entry["reason"] for entry in manifest["removed"])
    assert "1 taken out: unique" in capsys.readouterr().out


def test_a_leak_that_cannot_be_looked_for_is_told_of(tmp_path, chat, capsys):
    write_rows(tmp_path / "train" / "xbrl_term_train.jsonl", [("a", "b")])
    convert.convert_task("xbrl_term", tmp_path)
    removed = sources.manifest(sources.train_path("xbrl_term"))["removed"]
    assert removed[0]["note"] == "not looked for: xbrl_term_test.jsonl is not at hand"
    assert "not looked for" in capsys.readouterr().out


def test_every_repair_has_a_known_kind_a_reason_and_evidence():
    for name, spec in sources.tables()["tasks"].items():
        for repair in spec.get("repairs", ()):
            assert len(repair.keys() & REMOVALS.keys()) == 1, name
            assert repair["reason"] and repair["evidence"], name


@needs_finlora
def test_fifteen_published_rows_leave_the_training_set_of_xbrl_terms(chat):
    folder = sources.source_folder("xbrl_term")
    convert.convert_task("xbrl_term", folder)
    manifest = sources.manifest(sources.train_path("xbrl_term"))
    assert (manifest["rows_in"], manifest["rows"]) == (5856, 5724)
    assert manifest["validation"]["rows"] == 117
    assert [entry["rows"] for entry in manifest["removed"]] == [2, 11, 1, 1]
    train, test = (
        read_turns(sources.train_path("xbrl_term")),
        read_turns(sources.test_path("xbrl_term")),
    )
    assert len(test) == 651 and len({prompt for prompt, _ in train}) == len(train)
    normal = {" ".join(prompt.lower().split()) for prompt, _ in train}
    assert not normal & {" ".join(prompt.lower().split()) for prompt, _ in test}


# ---- Where a task's files are from


def test_a_task_is_taken_from_the_first_folder_that_has_any_of_its_files(
    tmp_path, chat, monkeypatch, capsys
):
    own, raw = tmp_path / "own", tmp_path / "raw"
    monkeypatch.setattr(sources, "RAW", raw)
    monkeypatch.setenv("FINLORA_DATA", str(own))
    write_rows(own / "data" / "test" / "ner_test.jsonl", [("Who is Ann?", "person")])
    write_rows(raw / "test" / "ner_test.jsonl", [("Where is Rome?", "location")])
    write_rows(raw / "train" / "ner_train.jsonl", [("Where is Oslo?", "location")])
    write_rows(raw / "train" / "headline_train.jsonl", [("Did gold rise?", "Yes")])
    assert sources.source_folder() == own / "data"
    folders = {task: sources.source_folder(task) for task in ("ner", "headline", "formula")}
    assert folders == {"ner": own / "data", "headline": raw, "formula": sources.SAMPLE}

    call(monkeypatch, "data", "ner,headline,formula")
    output = capsys.readouterr().out
    assert "(examples)" in output and f"from {raw}" in output
    assert not sources.train_path("ner").exists()  # nothing is filled up from another folder
    origins = {path.name: sources.manifest(path)["from"] for path in chat.glob("*.jsonl")}
    assert origins == {
        "ner_test.jsonl": "FINLORA_DATA",
        "headline_train.jsonl": "data/raw",
        "formula_train.jsonl": "data/sample",
        "formula_val.jsonl": "data/sample",
        "financial_math_test.jsonl": "data/sample",
    }


# ---- Multi-task sets


MULTI = {name: spec for name, spec in sources.tables()["tasks"].items() if "parts" in spec}


def test_a_multi_task_set_is_scored_on_the_datasets_of_its_parts():
    tasks = sources.tables()["tasks"]
    assert set(MULTI) == {"general_multi", "reporting_multi", "analysis_multi"}
    assert MULTI["reporting_multi"]["eval"] == ["finer", "fnxl", "xbrl_term"]
    for spec in MULTI.values():
        assert set(spec["eval"]) == {name for part in spec["parts"] for name in tasks[part]["eval"]}


@pytest.mark.parametrize("name", MULTI)
def test_a_multi_task_set_is_joined_from_its_parts(name, chat, monkeypatch):
    monkeypatch.setattr(sources, "source_folder", lambda task="": sources.SAMPLE)
    call(monkeypatch, "data", name)
    parts = [read_turns(sources.train_path(part)) for part in MULTI[name]["parts"]]
    joined = read_turns(sources.train_path(name))
    equal = min(map(len, parts))
    sizes = [equal if "equal" in MULTI[name] else len(part) for part in parts]
    assert len(joined) == sum(sizes)
    for part, size in zip(parts, sizes, strict=True):
        mine, joined = joined[:size], joined[size:]
        assert mine == [row for row in part if row in mine]  # in their order, none twice
    manifest = sources.manifest(sources.train_path(name))
    assert (
        manifest["rows"] + manifest["not_selected"] == manifest["rows_in"] == sum(map(len, parts))
    )
    assert manifest["from"] == "data/sample"
    tests = {sources.test_path(dataset).is_file() for dataset in MULTI[name]["eval"]}
    assert tests == {True}


def test_a_published_multi_task_set_is_used_where_it_is_at_hand(tmp_path, chat):
    rows = [("How is it?", "mildly positive"), ("Did gold rise?", "Yes"), ("Who is Ann?", "person")]
    write_rows(tmp_path / "train" / "multi" / "general_multi.jsonl", rows)
    convert.convert_task("general_multi", tmp_path)
    assert read_turns(sources.train_path("general_multi")) == rows
    assert sources.manifest(sources.train_path("general_multi"))["labels"]["Yes"] == 1


def test_rows_with_more_than_two_turns_join_by_their_prompt_and_last_answer(tmp_path):
    turns = [("system", "s"), ("user", "p"), ("assistant", "a"), ("user", "q"), ("assistant", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (batch,) = join.read_chat(path)
    assert batch.prompts == ["system: s\nuser: p\nassistant: a\nuser: q"]
    assert batch.answers == ["b"]


def test_parts_from_two_folders_are_not_joined(tmp_path, chat, capsys):
    write_rows(tmp_path / "train" / "finer_train_batched.jsonl", [("Which tags?", "A, B, C, D")])
    convert.convert_task("finer", tmp_path)
    convert.convert_task("xbrl_term", sources.SAMPLE)
    convert.convert_task("reporting_multi", sources.SAMPLE)
    assert not sources.train_path("reporting_multi").exists()
    assert "finer is from your own, xbrl_term is from data/sample" in capsys.readouterr().out


# ---- Tokens


@pytest.fixture(scope="module")
def ruler(smollm2):
    return lengths.load(str(smollm2))


def test_tokens_are_counted_as_training_sees_them(ruler, source, target):
    pairs = [("How is it? Answer:", "neutral"), ("é 🙂\n\nx", "A, B"), ("1", "2.50"), ("a b", "c")]
    write_rows(source, pairs)
    manifest = convert_rows(source, target, FREE, options=Options(lengths=ruler))
    prompts, answers = [], []
    for prompt, answer in pairs:
        turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole, prompt_part = (
            ruler.tokenizer.apply_chat_template(
                part, tokenize=True, return_dict=False, add_generation_prompt=generation
            )
            for part, generation in ((turn, False), (turn[:1], True))
        )
        assert whole[: len(prompt_part)] == prompt_part
        prompts.append(len(prompt_part))
        answers.append(len(whole) - len(prompt_part))
    for name, counts in (("prompt", prompts), ("answer", answers)):
        counts.sort()
        least, median, _, most = counts
        quantiles = {"min": least, "median": median, "p95": most, "max": most}
        assert manifest["tokens"][name] == quantiles
    assert manifest["tokens"]["over"] is None


def test_quantiles_are_by_nearest_rank():
    import numpy

    draw = random.Random(1)
    for size in (1, 2, 19, 20, 21, 1000):
        counts = [draw.randint(1, 50) for _ in range(size)]
        quantiles = lengths.compute_quantiles(Counter(counts))
        expected = numpy.quantile(counts, [0, 0.5, 0.95, 1], method="inverted_cdf")
        assert list(quantiles) == ["min", "median", "p95", "max"]
        assert list(quantiles.values()) == expected.tolist()


def bounded(ruler, length):
    return lengths.Lengths(ruler.tokenizer, ruler.name, length)


LONG_PROMPT = "Read this. " + "The cat sat on the mat. " * 200 + "What sat on the mat? Answer:"


def test_a_row_that_is_too_long_is_named_or_kept_aside_and_never_cut(ruler, source, target):
    write_rows(source, [("Short?", "yes"), (LONG_PROMPT, "cat")])
    options = Options(lengths=bounded(ruler, 100))
    with pytest.raises(
        WrongInput, match=r"rows.jsonl, line 2: 14\d\d tokens, 3 of them the answer"
    ):
        convert_rows(source, target, FREE, options=options)
    manifest = convert_rows(
        source, target, FREE, options=Options(quarantine=True, lengths=bounded(ruler, 100))
    )
    assert read_turns(target) == [("Short?", "yes")]
    assert (manifest["rows"], manifest["refused"]) == (1, 1)
    assert manifest["tokens"]["over"] == {"rows": 1, "share": 0.5, "cut": 0}
    assert json.loads(lines(sources.refused_path(target))[0]["text"])["context"] == LONG_PROMPT


def test_only_where_the_task_says_so_a_prompt_loses_its_middle(tmp_path, chat, ruler, monkeypatch):
    answer = "the " * 40 + "cat"
    write_rows(
        tmp_path / "train" / "formula_train.jsonl", [("Short?", "yes"), (LONG_PROMPT, answer)]
    )
    write_rows(tmp_path / "test" / "formula_test.jsonl", [(LONG_PROMPT, answer)])
    options = Options(lengths=bounded(ruler, 150))
    with pytest.raises(WrongInput, match="formula_train.jsonl, line 2: .* sequence_len of 150"):
        convert.convert_task("formula", tmp_path, options)
    monkeypatch.setitem(sources.tables()["tasks"]["formula"], "cut_long_prompts", "middle")
    convert.convert_task("formula", tmp_path, options)
    train = read_turns(sources.train_path("formula"))
    assert train[0] == ("Short?", "yes") and train[1][1] == answer
    start, end = train[1][0].split(turns.GAP)
    assert LONG_PROMPT.startswith(start) and LONG_PROMPT.endswith(end)
    assert abs(len(start) - len(end)) < 20
    (counted,) = ruler.count([rows.build_chat_row(train[1][0], answer)])
    assert 140 < sum(counted) <= 150
    assert sources.manifest(sources.train_path("formula"))["tokens"]["over"]["cut"] == 1
    # A test is asked as it stands.
    assert read_turns(sources.test_path("financial_math"))[0][0] == LONG_PROMPT


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused_even_so(ruler, source, target):
    write_rows(source, [("Short?", "yes"), ("Why?", "because " * 200)])
    rule = Rules(cut=True)
    with pytest.raises(WrongInput, match=r"line 2: 2\d\d tokens, 20\d of them the answer's"):
        convert_rows(source, target, rule, options=Options(lengths=bounded(ruler, 100)))


def test_the_command_counts_with_the_tokenizer_of_a_recipe(smollm2, chat, monkeypatch, capsys):
    monkeypatch.setattr(sources, "source_folder", lambda task="": sources.SAMPLE)
    call(monkeypatch, "data", "--recipe", "smollm2-135m/sentiment_r4")
    tokens = sources.manifest(sources.train_path("sentiment"))["tokens"]
    assert tokens["sequence_len"] == 2048 and tokens["tokenizer"].startswith("models/smollm2-135m")
    assert tokens["over"] == {"rows": 0, "share": 0.0, "cut": 0}
    assert not sources.train_path("ner").exists()  # the recipe's task alone
    assert "tokens: prompt " in capsys.readouterr().out


def test_the_command_counts_with_the_tokenizer_of_a_folder(
    smollm2, source, target, monkeypatch, capsys
):
    write_rows(source, [("How is it?", "neutral"), (LONG_PROMPT, "neutral")])
    arguments = ["convert", "fpb", source, target, "--tokenizer", smollm2]
    call(monkeypatch, *arguments)
    assert sources.manifest(target)["tokens"]["prompt"]["max"] > 1000
    for more, message in [
        (["--sequence-len", "100"], "more than the sequence_len of 100"),
        (["--sequence-len", "long"], "SEQUENCE_LEN must be a whole number of at least 1"),
        (["--tokenizer", source.parent], f"{source.parent} holds no tokenizer"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            call(monkeypatch, *arguments, *more)
        assert message in capsys.readouterr().err


def test_a_recipe_whose_tokenizer_is_not_at_hand_converts_and_says_so(
    source, target, tmp_path, monkeypatch
):
    write_rows(source, [("How is it?", "neutral")])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{base_model: nobody/gated, sequence_len: 9, output_dir: x, datasets: [{path: x.jsonl}]}"
    )
    call(monkeypatch, "convert", "fpb", source, target, "--recipe", recipe)
    tokens = sources.manifest(target)["tokens"]
    assert tokens == "not counted: the tokenizer of nobody/gated is not at hand"
    assert "RECIPE" in convert_rows(source, target, FREE)["tokens"]


# ---- FinLoRA's published data


def published():
    """(name, file, rules) of every published file that a dataset or a task names."""
    if not FINLORA:
        return []
    folder, table = sources.source_folder(), sources.tables()
    files = [(n, folder / d["file"]) for n, d in table["datasets"].items()]
    files += [(f"{n} train", folder / t["train"]) for n, t in table["tasks"].items()]
    return [(name, path) for name, path in files if path.is_file()]


@needs_finlora
@pytest.mark.parametrize(
    ("dataset", "counts"), [("tfns", (347, 1566, 475)), ("tfns_as_published", (347, 475, 1566))]
)
def test_tfns_is_repaired_only_under_its_repaired_name(target, dataset, counts):
    path = sources.source_folder() / "test" / "tfns_test.jsonl"
    manifest = convert_rows(path, target, load_test_rules(dataset, path))
    assert tuple(manifest["labels"].values()) == counts
    assert list(manifest["labels"]) == ["negative", "neutral", "positive"]
    assert bool(manifest["repair"]) is (dataset == "tfns")
    answers = Counter(answer for _, answer in read_turns(target))
    assert manifest["labels"] == answers


@needs_finlora
def test_a_changed_tfns_file_is_repaired_where_its_rows_show_the_swap(tmp_path, target):
    published = sources.source_folder() / "test" / "tfns_test.jsonl"
    changed = tmp_path / "tfns_test.jsonl"
    changed.write_bytes(published.read_bytes() + GOOD)
    manifest = convert_rows(changed, target, load_test_rules("tfns", changed))
    # The row that was added has not TFNS's instruction, so it keeps its label.
    assert manifest["labels"] == {"negative": 347, "neutral": 1567, "positive": 475}
    assert manifest["label_check"]["outcome"] == "repaired"


@needs_finlora
def test_sentiment_trains_on_900_rows_whose_prompts_are_not_tested(tmp_path, monkeypatch):
    folder = sources.source_folder()
    if (folder / sources.tables()["tasks"]["sentiment"]["train"]).is_file():
        pytest.skip("FinLoRA's own sentiment training file is at hand, so nothing is split")
    monkeypatch.setattr(sources, "CHAT", tmp_path)
    convert.convert_task("sentiment", folder)
    train, test = (
        read_turns(tmp_path / "sentiment_train.jsonl"),
        read_turns(tmp_path / "fpb_test.jsonl"),
    )
    train += read_turns(tmp_path / "sentiment_val.jsonl")
    assert len(train) == 900 and len(test) in (311, 312)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in test}
    source = lines(folder / "test" / "fpb_test.jsonl")
    rows = {(row["context"].strip(), row["target"]) for row in source}
    assert set(train) | set(test) == rows


@needs_finlora
@pytest.mark.parametrize(("name", "path"), published(), ids=[name for name, _ in published()])
def test_every_published_row_is_converted(target, name, path):
    rule = FREE if name.endswith(" train") else load_test_rules(name, path)
    manifest = convert_rows(path, target, rule)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    assert manifest["rows"] == len(rows) > 0
    expected = [(str(row["context"]).strip(), str(row["target"]).strip()) for row in rows]
    if instruction := sources.tables()["datasets"].get(name, {}).get("instruction"):
        words = instruction["instead_of"], instruction["write"]
        assert all(prompt.count(words[0]) == 1 for prompt, _ in expected)
        expected = [(prompt.replace(*words), answer) for prompt, answer in expected]
    assert read_turns(target) == [(p, rule.relabel.get(a, a)) for p, a in expected]


def test_the_published_data_is_looked_for_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RAW", tmp_path / "nothing")
    assert sources.source_folder() == (
        (Path(FINLORA) / "data").resolve() if FINLORA else sources.SAMPLE
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a small disk be mounted")
    try:
        source = sources.SAMPLE / "train" / "finlora_sentiment_train.jsonl"
        done = run("convert", "fpb", source, disk / "out.jsonl")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "no space left" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- Chat rows, and the rules for all rows

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
MENDED = [
    ({"context": "one\ftwo", "target": "up"}, "one\ntwo", "up", "page breaks made line breaks"),
    ({"context": "q", "target": "up<|im_end|>"}, "q", "up", "end tokens taken off answers"),
    (
        {"messages": [PAIR[0], {"role": "assistant", "content": "a</s>\n"}]},
        "q",
        "a",
        "end tokens taken off answers",
    ),
]


@pytest.mark.parametrize(("row", "prompt", "answer", "repair"), MENDED)
def test_what_can_be_repaired_is_repaired_and_counted(source, target, row, prompt, answer, repair):
    source.write_text(json.dumps(row) + "\n")
    manifest = convert_rows(source, target)
    assert read_turns(target) == [(prompt, answer)]
    assert manifest["repairs"] == {repair: 1}


def test_chat_rows_are_converted_as_they_are(source, target):
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}])
    chats = [
        {"messages": PAIR},
        {"messages": [{"role": "system", "content": "s"}, *PAIR, *PAIR], "tools": tools},
    ]
    source.write_bytes(b"".join(map(rows.write_chat_row, chats)))
    convert_rows(source, target)
    assert target.read_bytes() == source.read_bytes()


UNTRAINABLE = {
    "a control token": ({"context": "<|im_start|>user", "target": "a"}, "is a control token"),
    "one in a turn": ({"messages": [{"role": "user", "content": "a [INST] b"}, PAIR[1]]}, "[INST]"),
    "nan in a turn": ({"messages": [PAIR[0], {"role": "assistant", "content": "NaN"}]}, "missing"),
    "no answer": ({"messages": PAIR[:1]}, "ends with the user's turn"),
    "an end token alone": ({"context": "q", "target": "<|im_end|>"}, '"target" is empty'),
}


@pytest.mark.parametrize(("row", "reason"), UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_a_row_that_cannot_be_trained_is_refused(source, target, row, reason):
    source.write_text(json.dumps({"context": "q", "target": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(WrongInput) as error:
        convert_rows(source, target)
    assert f"{source}, line 2: " in str(error.value) and reason in str(error.value)


def test_all_bad_rows_are_listed(source, target, capsys):
    bad = [{"context": "q", "target": ""}] * 12 + [{"context": "", "target": "a"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(WrongInput, match='line 1: "target" is empty; 12 more rows cannot be used'):
        convert_rows(source, target)
    out = capsys.readouterr().out
    assert "line 10: " in out and "line 11: " not in out
    assert '12 rows: "target" is empty' in out and '1 rows: "context" is empty' in out


def test_a_damaged_tokenizer_config_of_a_base_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(WrongInput, match=r"tokenizer_config\.json"):
        bases.BaseTokenizer("mine", str(tmp_path), {})
