"""What `make look` prints is what is trained: the tokens and labels are Axolotl's own."""

import pytest

from tests.test_local import TONES, jsonl, mine  # noqa: F401
from tools import custom, recipes
from tools.common import WrongInput
from tools.data import look
from tools.models import load_tokenizer


def test_rows_are_shown_as_text_as_rendered_and_as_tokens(mine, smollm2, capsys):  # noqa: F811
    custom.create_task("late", jsonl(mine / "rows.jsonl", TONES))
    capsys.readouterr()
    look.show_rows("late", 2)
    out = capsys.readouterr().out
    assert out.count("as text") == out.count("as rendered") == 2
    assert "as smollm2-135m/late_r4 trains on it" in out
    (first, _) = [line for line in out.splitlines() if line.startswith("<|im_start|>|system|")]
    trained = first[first.index("|[") :]
    assert trained in ("|[Yes]|[<|im_end|>]|⏎", "|[No]|[<|im_end|>]|⏎")
    assert "[" not in first[: first.index("|[")]


def test_earlier_answers_that_are_not_trained_on_stand_without_brackets(mine, smollm2, capsys):  # noqa: F811
    turns = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Late."}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q {n}"},
                {"role": "assistant", "content": "Early."},
                *turns,
            ]
        }
        for n in range(30)
    ]
    source = jsonl(mine / "rows.jsonl", rows)
    for task, last_only in (("all", False), ("last", True)):
        custom.create_task(f"{task}_answers", source, custom.Choices(last_only=last_only))
        capsys.readouterr()
        look.show_rows(f"{task}_answers", 1)
        out = capsys.readouterr().out
        assert "[Late]" in out and ("[Early]" in out) != last_only


def test_trained_tokens_are_coloured_in_a_terminal(smollm2):
    tokenizer = load_tokenizer(recipes.find("smollm2-135m/sentiment_r4").config)
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert look.mark_tokens(tokenizer, ids, [-100, ids[1]], True) == "a|\x1b[1;32m b\x1b[0m"
    steering = tokenizer.encode("\x1b[2J", add_special_tokens=False)
    assert "\x1b" not in look.mark_tokens(tokenizer, steering, [-100] * len(steering), False)


def test_a_task_without_rows_is_named(mine):  # noqa: F811
    with pytest.raises(WrongInput, match="sentiment_train.jsonl is not there; `make data TASKS="):
        look.show_rows("sentiment", 1)
    with pytest.raises(WrongInput, match='unknown task "sentimnt"; did you mean sentiment'):
        look.show_rows("sentimnt", 1)


def test_a_row_that_is_too_long_says_so(mine, smollm2, capsys):  # noqa: F811
    custom.create_task("late", jsonl(mine / "rows.jsonl", TONES))
    path = recipes.find("smollm2-135m/late_r4").path
    path.write_text(path.read_text().replace("sequence_len: 512", "sequence_len: 20"))
    capsys.readouterr()
    look.show_rows("late", 1)
    assert "more than sequence_len (20): not trained on" in capsys.readouterr().out
