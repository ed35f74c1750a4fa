"""An adapter is merged, served and talked to as it was trained."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml

from tests.conftest import run
from tools import models, subjects
from tools.common import ROOT, JobFailed
from tools.use import chat, merge, serve

METHODS = {
    "nf4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "full": {},
    "nf4, DoRA": {"load_in_4bit": True, "peft_use_dora": True},
}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """A PEFT folder for each method, as `make train` leaves it, with adapters that do something."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    made = {}
    for name, options in METHODS.items():
        folder = tmp_path_factory.mktemp("run") / "adapter"
        config = {
            "base_model": str(tiny),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 16,
        } | options
        config |= {"lora_target_modules": ["q_proj", "k_proj", "v_proj"], "sequence_len": 512}
        config |= {"datasets": [{"path": "x.jsonl", "type": "chat_template"}]}
        config |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
        base, _ = models.load(config)
        lora = LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj"],
            use_dora=bool(options.get("peft_use_dora")),
        )
        model = get_peft_model(base, lora)
        generator = torch.Generator().manual_seed(1)
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.data = torch.randn(value.shape, generator=generator) * 0.2
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        made[name] = folder
    return made


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_base_and_adapter_at_the_precision_of_training(adapters, method):
    folder = adapters[method]
    who = subjects.find("", str(folder))
    target = merge.merge(who.config, folder)
    told = json.loads((target / "merge.json").read_text())
    assert told["precision"] == method.split(",")[0]
    # The tiny model's logits are of the order of 1; the adapter moves them by far more than this.
    assert told["largest_logit_difference"] < (0.05 if method == "int8" else 1e-3)
    merged, tokenizer = models.load({"base_model": str(target)})
    base, _ = models.load(who.config)
    moved = merge.difference(
        merge.logits(merged, tokenizer, None), merge.logits(base, tokenizer, None)
    )
    assert moved["largest_logit_difference"] > 0.1
    if method == "nf4":
        again = told["quantized_again"]["largest_logit_difference"]
        assert again > 10 * told["largest_logit_difference"]


def test_a_merged_model_is_not_made_twice_and_anew_for_another_adapter(adapters):
    folder = adapters["full"]
    who = subjects.find("", str(folder))
    target = merge.merge(who.config, folder)
    first = (target / "merge.json").stat().st_mtime_ns
    merge.merge(who.config, folder)
    assert (target / "merge.json").stat().st_mtime_ns == first
    told = json.loads((target / "merge.json").read_text())
    (target / "merge.json").write_text(json.dumps(told | {"adapter_sha256": "other"}))
    merge.merge(who.config, folder)
    assert json.loads((target / "merge.json").read_text()) == told


def test_a_merge_that_is_not_base_and_adapter_is_refused_and_leaves_nothing(
    adapters, tmp_path, monkeypatch
):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(adapters["full"], folder, ignore=shutil.ignore_patterns("merged"))
    monkeypatch.setitem(merge.TOLERANCE, "float32", 0.0)
    before = sorted(os.listdir(folder))
    with pytest.raises(JobFailed, match="the merged model is not base \\+ adapter"):
        merge.merge(subjects.find("", str(folder)).config, folder)
    assert sorted(os.listdir(folder)) == before


def test_the_command_for_vllm_keeps_the_base_quantized_and_the_adapter_apart(adapters, tmp_path):
    folder = adapters["nf4"]
    who = subjects.find("", str(folder))
    line = serve.on_vllm(who, "mine", ["--port", "1"])
    assert line[:3] == ["vllm", "serve", who.config["base_model"]]
    assert line[line.index("--lora-modules") + 1] == f"mine={folder}"
    assert line[line.index("--quantization") + 1] == "bitsandbytes"
    assert line[line.index("--max-lora-rank") + 1] == "8"
    # vLLM has no DoRA: the merged model is served.
    dora = subjects.find("", str(adapters["nf4, DoRA"]))
    line = serve.on_vllm(dora, "mine", [])
    assert line == ["vllm", "serve", str(adapters["nf4, DoRA"] / "merged")]


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def test_the_openai_client_gets_the_answer_that_chat_gives(adapters):
    import openai

    folder, port = adapters["nf4"], free_port()
    who = subjects.find("", str(folder))
    merge.merge(who.config, folder)
    server = subprocess.Popen(
        [sys.executable, "-m", "tools", "serve", "--adapter", str(folder), "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        name = server.stdout.readline().split('model "')[1].split('"')[0]
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
        asked = [{"role": "user", "content": "Is it good?"}]
        said = client.chat.completions.create(
            model=name, messages=asked, max_tokens=12, temperature=0
        )
        served = said.choices[0].message.content
    finally:
        server.terminate()
        server.wait(60)
    model, tokenizer = models.load({"base_model": str(folder / "merged")})
    expected = chat.answer(model, tokenizer, asked)
    assert served and expected.startswith(served.strip())


def test_one_prompt_is_answered_by_base_and_adapter_and_lines_are_a_conversation(adapters):
    folder = str(adapters["nf4"])
    once = run("chat", "", "Is it good?", "--adapter", folder)
    assert once.returncode == 0, once.stderr
    assert "base, nf4" in once.stdout and "adapter, nf4" in once.stdout
    done = subprocess.run(
        [sys.executable, "-m", "tools", "chat", "--adapter", folder],
        input="Is it good?\nAnd now?\n\nnever asked\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = models.load(subjects.find("", folder).config, adapters["nf4"])
    messages = []
    for text in ("Is it good?", "And now?"):
        messages.append({"role": "user", "content": text})
        said = chat.answer(model, tokenizer, messages)
        messages.append({"role": "assistant", "content": said})
        assert chat.harmless(said)[:40] in done.stdout


def test_what_a_model_says_does_not_steer_the_terminal():
    assert chat.harmless("a\x1b[2Jb\tc\nd\x07") == "a[2Jb\tc\nd"


@pytest.mark.parametrize("tool", ["chat", "merge", "serve"])
def test_without_a_recipe_or_with_a_wrong_adapter_one_line_says_so(tool, tmp_path):
    for arguments, said in (
        ((), "RECIPE=… is needed"),
        (("--adapter", str(tmp_path)), "no adapter_config.json"),
        (("llama-3.1-8b/ner_r4",), "is not trained"),
    ):
        done = run(f"tools.{tool}", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
    if tool == "serve":
        done = run("serve", "x", "--port", "99999")
        assert "PORT must be a number from 1 to 65535" in done.stderr
