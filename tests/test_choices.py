"""Answers can be limited to labels; such scores stand apart from those of free answers."""

import json
import random
import signal

import pytest

from evals import page, report
from evals import run as evaluation
from evals.answers import Prompts
from evals.choices import Constraint, spell_labels
from tests import tokenizers
from tests.conftest import call, run_first
from tests.test_backends import answered, ask, scored, server  # noqa: F401
from tests.test_eval import evaluate, trained, workplace  # noqa: F401
from tests.test_hub import finish
from tests.test_hub import scored as build_scores
from tests.test_report import runs  # noqa: F401
from tools import common, models, recipes, sources
from tools import runs as runs_module
from tools import subjects as subject_of
from tools.hub import card, push
from tools.hub import listing as hub_listing
from tools.use import chat, serve

LABELS = ["negative", "neutral", "positive"]
# Letters of several bytes, labels that begin another one, spaces and capitals.
HARD = ["strong negative", "strong", "größer", "中性", "中性的", "Yes", "10-K"]


# ---- what may come next


@pytest.mark.parametrize("model", run_first(2, reversed(tokenizers.BASES)))
def test_every_way_of_allowed_tokens_spells_a_label_and_ends(model):
    tokenizer = tokenizers.load(model)
    constraint = Constraint(tokenizer, HARD, [tokenizer.eos_token_id])
    chance, seen = random.Random(0), set()
    for _ in range(300):
        answer, tokens = b"", []
        while (token := chance.choice(constraint.list_next(answer))) != tokenizer.eos_token_id:
            tokens.append(token)
            answer += constraint.text_by_token[token]
        text = tokenizer.decode(tokens).strip()
        assert text in HARD
        seen.add(text)
    assert seen == set(HARD)
    for text in HARD:  # as the tokenizer writes it, too
        answer = b""
        for token in tokenizer.encode(text, add_special_tokens=False):
            assert token in constraint.list_next(answer)
            answer += constraint.text_by_token[token]
        assert tokenizer.eos_token_id in constraint.list_next(answer)


def test_a_label_that_has_no_tokens_is_refused():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"up": 0, "▁": 1, "<end>": 2}, unk_token="<end>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>")
    assert Constraint(tokenizer, ["up"], [2]).list_next(b"") == [0, 1]
    with pytest.raises(common.WrongInput, match='cannot spell the label "down"'):
        Constraint(tokenizer, ["up", "down"], [2])


# ---- scores


def read_scores(folder, name):
    return json.loads((folder / "evals" / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_constrained_score_is_one_of_its_own(trained, monkeypatch, capsys):  # noqa: F811
    recipe, folder = trained()
    base_folder = folder.with_name("base_nf4")
    arguments = (recipe, "--tasks", "fpb,fiqa", "--limit", "12")
    evaluate(monkeypatch, *arguments)
    free = read_scores(folder, "fpb_sample12")
    assert not {row["answer"].strip() for row in free["predictions"]} & set(LABELS)
    assert "constrained_to" not in free["evaluated"]
    printed = capsys.readouterr().out
    assert "CONSTRAIN=1" not in printed and ", constrained" not in printed

    evaluate(monkeypatch, *arguments, "--constrain")
    printed = capsys.readouterr().out
    assert "base, constrained" in printed and "adapter, constrained" in printed
    assert "CONSTRAIN=1: an answer could only be negative, neutral, positive" in printed
    assert "scored 0" not in printed and "answered already" not in printed
    for place in (folder, base_folder):
        content = read_scores(place, "fpb_constrained_sample12")
        assert content["evaluated"]["constrained_to"] == LABELS
        rows = content["predictions"]
        assert all(row["answer"].strip() in LABELS for row in rows)
        assert all(row["answered"] == row["answer"].strip() for row in rows)
        # The probabilities are those of the model, whatever it may answer.
        free_rows = read_scores(place, "fpb_sample12")["predictions"]
        assert [row["probabilities"] for row in rows] == [row["probabilities"] for row in free_rows]
    assert read_scores(folder, "fpb_sample12") == free

    monkeypatch.setattr(evaluation.Job, "score", None)  # both stand: nothing is scored again
    evaluate(monkeypatch, *arguments)
    evaluate(monkeypatch, *arguments, "--constrain")


def test_the_packed_scorer_and_chat_answer_alike(trained, monkeypatch):  # noqa: F811
    """Batches, padding and packs change no constrained answer, nor where it ends."""
    recipe, folder = trained()
    evaluate(monkeypatch, recipe, "--tasks", "nwgi", "--limit", "10", "--constrain")
    content = read_scores(folder, "nwgi_constrained_sample10")
    labels = content["evaluated"]["constrained_to"]
    assert len(labels) == 7 and "mildly positive" in labels
    subject = subject_of.find(str(recipe))
    model, tokenizer = models.load(subject.config, subject.adapter)
    style = chat.Style(subject.options, subject.prompt_format, labels)
    rows = [json.loads(line) for line in sources.test_path("nwgi").open()]
    answers = [row["answer"].strip() for row in content["predictions"]]
    assert set(answers) <= set(labels)
    turns = (rows[row["row"]]["messages"][:1] for row in content["predictions"])
    assert answers == [chat.answer(model, tokenizer, turn, style) for turn in turns]


def test_datasets_with_the_same_prompts_and_labels_get_the_same_answers(
    trained,  # noqa: F811
    monkeypatch,
    capsys,
):
    recipe, folder = trained()
    evaluate(monkeypatch, recipe, "--tasks", "nwgi,nwgi_folded", "--limit", "6", "--constrain")
    assert " 6/6 rows" in capsys.readouterr().out
    levels = read_scores(folder, "nwgi_constrained_sample6")
    classes = read_scores(folder, "nwgi_folded_constrained_sample6")
    labels = classes["evaluated"]["constrained_to"]
    assert set(labels) == set(levels["evaluated"]["constrained_to"]) and len(labels) == 7
    answers = [row["answer"] for row in classes["predictions"]]
    assert {answer.strip() for answer in answers} <= set(labels)
    assert [row["answer"] for row in levels["predictions"]] == answers


@pytest.mark.parametrize("verb", ["eval", "predict", "chat"])
def test_without_labels_a_constraint_is_refused_in_one_line(verb, trained, monkeypatch, capsys):  # noqa: F811
    recipe, folder = trained()
    data = folder.parent / "rows.csv"
    data.write_text("text\nSales rose\n")
    arguments = {
        "eval": [recipe, "--tasks", "xbrl_term,ner"],
        "predict": [
            recipe,
            "--task",
            "xbrl_term",
            "--data",
            data,
            "--out",
            data.with_name("o.csv"),
        ],
        "chat": ["", "Sales rose", "--adapter", folder],
    }[verb]
    if verb == "chat":
        (folder / "config.yaml").write_text(
            (folder / "config.yaml").read_text().replace("sentiment_train", "xbrl_term_train")
        )
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, verb, *arguments, "--constrain")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CONSTRAIN=1 limits answers to labels, and ")
    assert "xbrl_term" in line
    assert "TASKS=ner has some" in line or verb != "eval"


def test_serving_takes_a_constraint_with_vllm_alone(trained, monkeypatch, capsys):  # noqa: F811
    recipe, _ = trained()
    monkeypatch.setattr(serve, "find_engine", lambda *_: None)  # as where there is no vLLM
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "serve", recipe, "--port", 18231, "--constrain")
    assert stopped.value.code == 2
    assert "CONSTRAIN=1 needs vLLM" in capsys.readouterr().err


def test_predict_writes_labels_alone(trained, monkeypatch, capsys):  # noqa: F811
    recipe, folder = trained()
    data, out = folder.parent / "rows.csv", folder.parent / "out.csv"
    data.write_text("text\n" + "".join(f"Sales rose by {n} %\n" for n in range(7)))
    call(monkeypatch, "predict", recipe, "--data", data, "--out", out)
    words = [line.rsplit(",", 4)[1] for line in out.read_text().splitlines()[1:]]
    assert words == ["[none]"] * 7  # random weights
    out.unlink()
    call(monkeypatch, "predict", recipe, "--data", data, "--out", out, "--constrain")
    assert "an answer can only be negative, neutral, positive" in capsys.readouterr().out
    words = [line.rsplit(",", 4)[1] for line in out.read_text().splitlines()[1:]]
    assert len(words) == 7 and set(words) <= set(LABELS)


# ---- pages and cards


def constrain(content):
    return content | {"evaluated": content["evaluated"] | {"constrained_to": LABELS}}


def test_a_page_compares_a_constrained_score_with_no_free_one(runs):  # noqa: F811
    for side in ("base", "adapter"):
        for dataset in ("fpb", "fiqa"):
            file = runs.file(side, dataset, None)
            content = constrain(json.loads(file.read_text()))
            common.write_json(file.with_name(f"{dataset}_constrained.json"), content)
    entries = page.find_scored()
    assert [entry.method for entry in entries] == [
        *("base", "base, constrained", "sentiment_r4", "sentiment_r4, constrained")
    ]
    base, base_limited, adapter, limited = entries
    assert not report.paired(base.contents["fpb"], base_limited.contents["fpb"])
    gains = page._compare_with_base(limited, entries)
    assert gains == report.differences(base_limited.contents, limited.contents) != {}
    assert page._compare_others(entries) == []
    assert any("CONSTRAIN=1" in line for line in page.explain(limited, gains))
    assert not any("CONSTRAIN=1" in line for line in page.explain(adapter, {}))
    # FinLoRA's answers were free.
    llama = {dataset: content for dataset, content in limited.contents.items()}
    assert report.against_published(llama, "4bits_r4") == {}
    assert report.against_published(adapter.contents, "4bits_r4") != {}
    files = page.build(runs_module.RUNS / "report", lambda *_: {})
    assert "sentiment_r4, constrained" in files[0].read_text()


def test_a_card_shows_a_constrained_score_beside_the_free_one(tmp_path, trained):  # noqa: F811
    _, folder = trained()
    recipe = recipes.find("smollm2-135m/sentiment_r4")
    finish(folder, recipe)
    sha = common.digest(folder / "adapter_model.safetensors")
    for place, digest, answers in (
        (folder, sha, ["neutral", "positive"] * 20),
        (folder.with_name("base_nf4"), None, ["positive"] * 40),
    ):
        content = constrain(build_scores(digest, "fpb", answers))
        common.write_json(place / "evals" / "fpb_constrained.json", content)
    scores = push.collect_scores(runs_module.Run(folder), sha, "nf4")
    assert list(scores) == ["fpb", "fpb_constrained"]
    assert all(set(pair) == {"base", "adapter"} for pair in scores.values())
    rows, verdicts = card.tabulate_scores(scores)
    assert [row["dataset"] for row in rows if row["metric"] == "accuracy"] == [
        *("fpb", "fpb, constrained")
    ]
    assert rows[:2] == card.tabulate_scores({"fpb": scores["fpb"]})[0]
    compared = [line.partition(", accuracy: ") for line in verdicts if ", accuracy: " in line]
    assert [name for name, *_ in compared] == ["fpb", "fpb, constrained"]
    free, limited = (card.list_results({name: pair}) for name, pair in scores.items())
    assert {result.metric_name for result in free} == {"accuracy", "macro F1"}
    assert {result.metric_name for result in limited} == {
        *("accuracy, constrained", "macro F1, constrained")
    }
    assert all(result.metric_args["constrained_to"] == LABELS for result in limited)
    assert card.describe_scores(scores)["constrained"]
    assert not card.describe_scores({"fpb": scores["fpb"]})["constrained"]
    (folder / "evals" / "fpb.json").unlink()  # where it is the only one, a list says so
    ((_, _, text, _),) = hub_listing.list_local()
    assert text == "fpb accuracy, constrained 50.0"


# ---- endpoints


def test_an_endpoint_gets_the_choices_and_must_keep_to_them(server, monkeypatch, capsys):  # noqa: F811
    ask(monkeypatch, server, "--constrain")
    content = scored("fpb_constrained_sample8")
    assert content["evaluated"]["constrained_to"] == LABELS
    for _, body in server.bodies:
        assert body["structured_outputs"] == {"choice": spell_labels(LABELS)}
        assert body["max_tokens"] == 10
    (entry,) = page.find_scored()
    assert entry.method == "endpoint, constrained"
    server.asked.clear()
    ask(monkeypatch, server)
    assert len(server.asked) == 8  # free answers are asked for
    assert not any("structured_outputs" in body for _, body in server.bodies[8:])

    # A server of today that gets the older `guided_choice`, or one that is not vLLM's.
    server.misbehave = lambda handler, times, body: handler.reply(answered("It is up.")) or True
    with pytest.raises(SystemExit) as stopped:
        ask(monkeypatch, server, "--constrain", "--force")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ignores structured_outputs" in line and "'It is up.'" in line


def test_a_budget_has_room_for_the_longest_label(server, monkeypatch):  # noqa: F811
    name = "nwgi"
    rows = [json.loads(line)["messages"] for line in sources.test_path(name).open()]
    server.key = {row[0]["content"]: row[1]["content"] for row in rows}
    arguments = ["--backend", "openai", "--base-url", server.url, "--model-name", "teacher"]
    evaluate(monkeypatch, *arguments, "--tasks", name, "--limit", 4, "--constrain")
    assert {body["max_tokens"] for _, body in server.bodies} == {len(" moderately negative") + 1}


def test_a_backend_without_a_constraint_refuses_it(workplace):  # noqa: F811
    from evals.choices import allow_labels
    from tests.test_eval import Speaker, key

    speaker = Speaker(key)
    with pytest.raises(common.WrongInput, match="has no CONSTRAIN=1"):
        allow_labels(speaker, LABELS)
    rows, _ = evaluation.measure(speaker, "fpb", 4, Prompts("chat"))
    assert len(rows) == 4
