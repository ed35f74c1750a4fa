"""Worked examples for a base: which they are, how they stand in a prompt, where scores go."""

import json
from collections import Counter

import pytest

from evals import examples, page, report
from evals import run as evaluation
from evals.answers import Answers, Prompts
from evals.endpoint import Endpoint
from tests.conftest import call, write_recipe
from tests.conftest import run as command
from tests.test_eval import Speaker, key, workplace  # noqa: F401
from tools import models, prompts, runs, sources
from tools.common import WrongInput, digest, write_json
from tools.data import convert
from tools.data.rules import fingerprint


def write_chat(path, rows, labels=None):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    write_json(
        sources.manifest_path(path),
        {"source": path.name, "sha256": digest(path), "labels": labels or {}},
    )
    return path


def make_row(question, answer, *before):
    turns = [*before, ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def chat(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def sentiment(workplace):  # noqa: F811
    convert.convert_task("sentiment", sources.SAMPLE)
    return sources.test_path("fpb")


# ---- the choice


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (3, [1, 1, 1]), (7, [2, 2, 3])])
def test_examples_are_training_rows_with_balanced_labels(sentiment, count, sizes):
    rows = examples.choose_examples(sentiment, count)
    assert sorted(Counter(map(key, rows)).values()) == sizes
    lines = sources.train_path("sentiment").read_text().splitlines()
    assert all(row in map(json.loads, lines) for row in rows)


def test_the_choice_depends_on_no_order_and_the_first_examples_stay(chat):
    rows = [make_row(f"How is {n}?", ("positive", "negative")[n % 2]) for n in range(40)]
    test = write_chat(chat / "fpb_test.jsonl", [make_row("?", "positive")], {"positive": 1})
    train = chat / "sentiment_train.jsonl"
    write_chat(train, rows)
    first = examples.choose_examples(test, 6)
    write_chat(train, rows[::-1])
    assert examples.choose_examples(test, 6) == first
    assert examples.choose_examples(test, 4) == first[:4]
    assert Counter(map(key, first)) == {"positive": 3, "negative": 3}


def test_no_prompt_of_the_test_rows_and_none_twice(chat):
    rows = [make_row(f"Question  {n % 5}?", "yes") for n in range(50)]
    tested = [make_row("question 0?", "no"), make_row("QUESTION 1?", "no")]
    write_chat(chat / "sentiment_train.jsonl", rows)
    test = write_chat(chat / "fpb_test.jsonl", tested)
    chosen = [row["messages"][0]["content"] for row in examples.choose_examples(test, 3)]
    marks = {fingerprint(question) for question in chosen}
    assert marks == {fingerprint(f"Question {n}?") for n in (2, 3, 4)}
    with pytest.raises(WrongInput, match=r"4 worked examples are too many: .* has 3 rows"):
        examples.choose_examples(test, 4)


def test_rows_of_several_turns_and_other_labels_are_no_examples(chat):
    tool = {"type": "function", "function": {"name": "f", "arguments": {}}}
    called = make_row("Call it.", "positive")
    called["messages"][-1]["tool_calls"] = [tool]
    rows = [
        make_row("Again?", "positive", ("user", "Once?"), ("assistant", "positive")),
        make_row("Which?", "sideways"),
        make_row("Use it.", "positive") | {"tools": [tool]},
        called,
        make_row("Fine?", "positive", ("system", "Be brief.")),
        make_row("Bad?", "negative"),
    ]
    write_chat(chat / "sentiment_train.jsonl", rows)
    test = write_chat(chat / "fpb_test.jsonl", [make_row("?", "positive")], {"positive": 1})
    chosen = examples.choose_examples(test, 2)
    assert sorted(chosen, key=str) == sorted(rows[-2:], key=str)
    with pytest.raises(WrongInput, match="3 worked examples are too many"):
        examples.choose_examples(test, 3)


def test_labels_are_those_of_the_dataset_whatever_its_test_rows_have(chat):
    labels = sorted(sources.tables()["datasets"]["fpb"]["labels"])
    rows = [make_row(f"How is {n}?", labels[n % 3]) for n in range(30)]
    write_chat(chat / "sentiment_train.jsonl", rows)
    test = write_chat(chat / "fpb_test.jsonl", [make_row("?", labels[0])], {labels[0]: 1})
    assert Counter(map(key, examples.choose_examples(test, 3))) == dict.fromkeys(labels, 1)


def test_examples_of_one_label_are_refused(chat):
    write_chat(chat / "sentiment_train.jsonl", [make_row(f"{n}?", "up") for n in range(9)])
    test = write_chat(chat / "x_test.jsonl", [make_row("?", "up")], {"up": 1, "down": 0})
    tables = sources.tables()
    with pytest.MonkeyPatch.context() as patch:
        tasks = tables["tasks"] | {"sentiment": tables["tasks"]["sentiment"] | {"eval": ["x"]}}
        patch.setattr(sources, "tables", lambda: tables | {"tasks": tasks})
        with pytest.raises(
            WrongInput, match="with up of the 2 labels of .* would teach one answer"
        ):
            examples.choose_examples(test, 2)


def test_every_dataset_has_a_task_whose_rows_are_its_examples():
    for name in sources.tables()["datasets"]:
        path = examples.find_training_rows(sources.test_path(name))
        assert path.name.removesuffix("_train.jsonl") in sources.tables()["tasks"]


# ---- the prompt


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return models.load_tokenizer({"base_model": str(smollm2)})


def list_turns(rows):
    return [turn for row in rows for turn in row["messages"]]


class Renderer(Speaker):
    """A model whose answers are the keys, with a tokenizer, which makes prompts whole."""

    def __init__(self, tokenizer, room):
        super().__init__(key)
        self.tokenizer, self.max_length = tokenizer, room


def test_a_prompt_is_what_the_template_gives_for_the_turns(sentiment, tokenizer):
    rows = examples.choose_examples(sentiment, 3)
    lm = Renderer(tokenizer, 8192)
    scored, _ = evaluation.measure(lm, "fpb", 5, Prompts("chat", None, rows))
    docs = [json.loads(line) for line in sentiment.read_text().splitlines()]
    expected = [
        tokenizer.apply_chat_template(
            [*list_turns(rows), docs[row["row"]]["messages"][0]],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in scored
    ]
    assert sorted(lm.asked) == sorted(expected)
    assert not any("dropped_examples" in row for row in scored)
    assert all(text.count("<|im_start|>user") == 4 for text in lm.asked)


def test_examples_that_do_not_fit_are_dropped_from_the_end_and_counted(sentiment, tokenizer):
    rows = examples.choose_examples(sentiment, 3)
    docs = [json.loads(line) for line in sentiment.read_text().splitlines()]
    question = docs[0]["messages"][0]["content"]
    turns = list_turns(rows)
    whole = {
        count: prompts.render(
            tokenizer, [*turns[: 2 * count], {"role": "user", "content": question}]
        )
        for count in range(4)
    }
    for count, text in whole.items():
        room = len(tokenizer.encode(text))
        writer = Prompts("chat", None, rows)
        assert writer.fit(tokenizer, question, room, turns) == text
        assert writer.dropped == ({text: 3 - count} if count < 3 else {})
        assert not writer.cut
    writer = Prompts("chat", None, rows)
    text = writer.fit(tokenizer, question, len(tokenizer.encode(whole[0])) - 5, turns)
    assert writer.dropped == {text: 3} and writer.cut[text] >= 5


def test_a_system_turn_of_the_question_comes_first():
    writer = Prompts("chat")
    writer.rows["text"] = make_row("Now?", "yes", ("system", "Be brief."))
    example = [{"role": "user", "content": "Then?"}, {"role": "assistant", "content": "no"}]
    turns, tools = writer.conversation("text", example)
    assert [turn["content"] for turn in turns] == ["Be brief.", "Then?", "no", "Now?"]
    assert tools is None


@pytest.mark.parametrize("form", ["bare", "finlora"])
def test_a_completion_behind_an_endpoint_has_the_examples_as_text(form):
    example = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    text = Prompts(form).text(None, "2?", example)
    before, after = prompts.FORMATS[form].split("{}")
    assert text == f"{before}1?{after} one\n\n{before}2?{after}"


def test_an_endpoint_gets_the_examples_as_turns(sentiment):
    rows = examples.choose_examples(sentiment, 2)
    lm = Speaker(key)
    evaluation.measure(lm, "fpb", 4, Prompts("chat", None, rows))
    docs = [json.loads(line) for line in sentiment.read_text().splitlines()]
    for text in lm.asked:
        turns, _ = lm.conversation(text)
        assert turns[:-1] == list_turns(rows)
        assert turns[-1] in [doc["messages"][0] for doc in docs]


def test_an_answer_without_examples_is_not_taken_for_one_with_them(sentiment, tmp_path):
    rows, file = examples.choose_examples(sentiment, 2), tmp_path / "answers.jsonl"
    first, second = Speaker(key), Speaker(key)
    evaluation.measure(first, "fpb", 4, Prompts("chat"), Answers(file, {}))
    evaluation.measure(second, "fpb", 4, Prompts("chat", None, rows), Answers(file, {}))
    assert len(first.asked) == len(second.asked) == 4


# ---- the command, its scores and their page


@pytest.fixture
def recipe(sentiment, tiny, tmp_path):
    """A recipe of a tiny base, whose scores go below runs/tiny/."""
    changes = {"output_dir": str(runs.RUNS / "tiny" / "r4")}
    return write_recipe(tmp_path, "r4", tiny, sources.train_path("sentiment"), **changes)


def test_the_base_is_scored_with_examples_in_a_folder_of_its_own(recipe, monkeypatch, capsys):
    call(monkeypatch, "eval", recipe, "--base", "--tasks", "fpb", "--limit", "6")
    call(monkeypatch, "eval", recipe, "--shots", "2", "--tasks", "fpb", "--limit", "6")
    out = capsys.readouterr().out
    assert "the base alone is scored with 2 worked examples" in out
    assert "base, 2 examples" in out
    files = sorted(runs.RUNS.glob("**/evals/fpb*.json"))
    plain, few = (report.read(file) for file in files)
    assert files[1].parent.parent.name == f"{files[0].parent.parent.name}_2_shots"
    assert "shots" not in plain["evaluated"]
    assert few["evaluated"]["shots"] == 2 and len(few["evaluated"]["examples_sha256"]) == 64
    entries = {entry.method: entry for entry in page.find_scored()}
    assert set(entries) == {"base", "base, 2 examples"}
    assert not page._find_published(entries["base, 2 examples"])
    text = page.build(runs.RUNS / "report", lambda *_: {})[0].read_text()
    assert "base, 2 examples" in text
    # A second call finds the score.
    written = files[1].stat().st_mtime_ns
    call(monkeypatch, "eval", recipe, "--shots", "2", "--tasks", "fpb", "--limit", "6")
    assert files[1].stat().st_mtime_ns == written


def test_the_report_says_for_how_many_rows_examples_were_dropped():
    content = {
        "evaluated": {"shots": 3},
        "metrics": {},
        "predictions": [],
        "rows_with_fewer_examples": 4,
    }
    assert report._list_notes(content) == [
        "4 rows had less than 3 examples, which would not fit into the context"
    ]


@pytest.mark.parametrize("arguments", [("--adapter", "some/adapter"), ()])
def test_examples_are_for_a_base_alone(arguments):
    done = command("eval", "--shots", "3", *arguments)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: SHOTS= scores a base with worked examples: name its RECIPE=, no ADAPTER="
    )


def test_an_endpoints_scores_with_examples_have_a_folder_of_their_own():
    plain, few = (Endpoint("http://h/v1", "m", "chat", shots) for shots in (0, 3))
    assert plain.file("base", "fpb", None).parent.parent.name == "m"
    assert few.file("base", "fpb", 20).parent.parent.name == "m_3_shots"
