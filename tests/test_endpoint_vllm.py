"""vLLM's own server as an endpoint gets the scores that transformers gets, and keeps to labels.

Skipped where `make setup-vllm` has not made .venv-vllm.
"""

import json
import os
import subprocess
import time
import urllib.request

import pytest
import yaml

from evals.choices import spell_labels
from tests.conftest import make_adapter
from tests.test_eval import evaluate, workplace  # noqa: F401
from tests.test_serve import free_port
from tools import common, recipes, runs

PYTHON = common.ROOT / ".venv-vllm" / "bin" / "python"
LABELS = ["negative", "neutral", "positive"]
ROWS = 24
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed; `make setup-vllm`"),
]


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    return make_adapter(smollm2, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def vllm(smollm2, adapter):
    """The address of vLLM's server with the models `base` and `adapter`."""
    port = free_port()
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    options += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"adapter={adapter}"]
    address = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
    module = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", smollm2]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        list(map(str, [*module, *address, *options])),
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        assert process.poll() is None
        yield f"{url}/v1"
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def complete(url, **more):
    body = {"model": "base", "temperature": 0, "max_tokens": 12}
    body |= {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    data, header = json.dumps(body | more).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", data, header)
    reply = json.load(urllib.request.urlopen(request, timeout=120))
    return reply["choices"][0]["message"]["content"]


def test_structured_outputs_bite_and_the_older_field_does_not(vllm):
    assert "Paris" in complete(vllm)
    choice = complete(vllm, structured_outputs={"choice": spell_labels(LABELS)})
    assert choice.strip() in LABELS
    assert complete(vllm, guided_choice=LABELS) == complete(vllm)


def read_answers(path):
    rows = json.loads(path.read_text())["predictions"]
    return {row["row"]: row["answer"].strip() for row in rows}


@pytest.mark.parametrize("constraint", [[], ["--constrain"]], ids=["free", "constrained"])
def test_the_endpoint_and_transformers_give_the_same_answers(
    constraint,
    vllm,
    smollm2,
    adapter,
    workplace,  # noqa: F811
    monkeypatch,
):
    content = recipes.build_config("smollm2-135m/sentiment_r4") | {"base_model": str(smollm2)}
    recipe = workplace / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    rows = ["--tasks", "fpb", "--limit", ROWS, *constraint]
    evaluate(monkeypatch, recipe, "--adapter", adapter, "--precision", "fp32", *rows)
    name = f"fpb{'_constrained' if constraint else ''}_sample{ROWS}.json"
    (local_base,) = runs.RUNS.glob(f"*/base_fp32/evals/{name}")
    (local_adapter,) = runs.RUNS.glob(f"*/adapter_*/evals/{name.replace('fpb', 'fpb_fp32')}")
    for side, file in (("base", local_base), ("adapter", local_adapter)):
        endpoint = ["--backend", "openai", "--base-url", vllm, "--model-name", side]
        evaluate(monkeypatch, *endpoint, *rows)
        remote = runs.RUNS / "endpoint" / side / "evals" / name
        local, answers = read_answers(file), read_answers(remote)
        differing = {row: (local[row], answers[row]) for row in local if local[row] != answers[row]}
        assert len(differing) <= 1, differing  # float32 of two libraries
        assert json.loads(remote.read_text())["usage"]["tokens_in"] > ROWS * 50
        if constraint:
            assert set(answers.values()) <= set(LABELS)
