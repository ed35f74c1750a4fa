"""lm-eval's model on vLLM, which runs in a Python of its own (evals/vllm_worker.py).

Prompts are rendered, cut and encoded here, and answers are decoded and ended here, as with
transformers (evals/model.py): only the tokens between come from vLLM.
"""

import json
import os
import re
import subprocess
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import configure_pad_token

from evals.choices import request_choice
from evals.model import Model
from tools.common import JobFailed, stop_group
from tools.vllm import Engine

WORKER = Path(__file__).with_name("vllm_worker.py")
ROWS = {"cpu": 64, "cuda": 1024}  # that vLLM answers before they are saved
# One process, so that nothing outlives it, and only errors in its log.
VARIABLES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SHORTEST = 2048  # tokens of room at least, where the model has so many
# A line of a log that names an error, and what vLLM says after the real one.
ERROR = re.compile(r"\b(\w*(?:Error|Exception): .+)")
ECHO = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc .*failed")
RUNNING: "weakref.WeakSet[Worker]" = weakref.WeakSet()  # one at a time: each takes gigabytes


class Worker:
    """vLLM in a process of its own.

    It starts with the first prompts, with room for the longest of them, and starts again for longer
    ones: the whole context of a model takes gigabytes of keys and values. `arguments` are those of
    vllm.LLM; `config` is the base's config of transformers.
    """

    def __init__(self, engine: Engine, arguments: dict[str, Any], config: Any) -> None:
        self.engine, self.arguments, self.config = engine, arguments, config
        self.room = 0
        self.end: Any = lambda: None

    def answer(
        self, prompts: list[list[int]], adapter: Path | None, sampling: dict[str, Any], context: int
    ) -> list[dict[str, Any]]:
        """{"tokens", "logits"} for each prompt of token ids (see evals/vllm_worker.py).

        Raises JobFailed where vLLM fails.
        """
        longest = max(map(len, prompts)) + sampling["max_tokens"]
        if longest > self.room:
            self.start(longest, context)
        path = str(adapter) if adapter else None
        request = {"prompts": prompts, "adapter": path, "sampling": sampling}
        answers: list[dict[str, Any]] = self.send(request)["answers"]
        return answers

    def start(self, longest: int, context: int) -> None:
        """Starts vLLM with room for prompts and answers of `longest` tokens."""
        for worker in list(RUNNING):
            worker.stop()
        self.room = min(context, max(SHORTEST, 2 ** (longest - 1).bit_length()))
        print(f"vllm       starts on {self.engine.device}, {self.arguments['dtype']}", flush=True)
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*self.engine.python, str(WORKER)],
            env=os.environ | VARIABLES | self.engine.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("DEBUG") else self.log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the group
        )
        self.end = weakref.finalize(self, stop_engine, self.process)
        RUNNING.add(self)
        self.send(self.arguments | {"max_model_len": self.room})

    def stop(self) -> None:
        self.end()
        self.room = 0
        RUNNING.discard(self)

    def send(self, content: dict[str, Any]) -> dict[str, Any]:
        """The reply to a line; raises JobFailed where there is none."""
        assert self.process.stdin and self.process.stdout
        reply = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(reply) if reply.endswith("\n") else {}
        if answer and "error" not in answer:
            return answer
        self.stop()
        raise JobFailed(f"vLLM failed: {self.explain_failure(answer.get('error'))}")

    def explain_failure(self, error: str | None) -> str:
        """The cause of a failure: the last error, of `error` and the log, that echoes no other."""
        self.log.seek(0)
        causes = [match[1] for line in self.log if (match := ERROR.search(line))]
        causes += [error] if error else []
        first_causes = (cause for cause in reversed(causes) if not ECHO.search(cause))
        cause = next(first_causes, f"it ended with status {self.process.wait()}")
        return " ".join(cause.split())[:400]


def stop_engine(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):  # what was not read
        process.stdin.close()  # type: ignore[union-attr]
    stop_group(process, 10)


class VllmModel(Model):
    """Answers with vLLM."""

    backend = "causal"
    add_bos_token = None
    custom_prefix_token_id = None
    _max_length = None

    def __init__(self, worker: Worker, tokenizer: Any, adapter: Path | None):
        TemplateLM.__init__(self)  # without a model of transformers
        self._model, self._device = SimpleNamespace(config=worker.config), torch.device("cpu")
        self.worker, self.adapter = worker, adapter
        self.tokenizer = configure_pad_token(tokenizer, model_config=worker.config)
        self.packs = False
        self.labels: list[str] = []
        self.probabilities: list[dict[str, float]] = []

    def make_constraint(self) -> None:
        """Makes none: vLLM limits the answers itself."""

    def divide(self, prompts: list[list[int]], budget: int) -> list[list[int]]:
        """Batches of the prompts' numbers, in their order: vLLM forms its own batches."""
        rows = ROWS.get(self.worker.engine.device, ROWS["cuda"])
        numbers = list(range(len(prompts)))
        return [numbers[first : first + rows] for first in numbers[::rows]]

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: torch.Tensor,
        logits_processor: list[Any],
        **settings: Any,
    ) -> torch.Tensor:
        """(rows, tokens) prompts and answers; rows are padded as transformers pads them."""
        rows = zip(context, attention_mask, strict=True)
        prompts = [row[mask.bool()].tolist() for row, mask in rows]
        sampling = {
            "max_tokens": max_length - context.shape[1],
            "temperature": settings.get("temperature", 0.0),
            "stop": stop,
            "skip_special_tokens": False,  # a stop may be one
            "stop_token_ids": [self.eot_token_id],
        }
        (first,) = logits_processor or [None]  # a FirstToken alone: vLLM limits answers itself
        ids = sorted(token for tokens in first.tokens.values() for token in tokens) if first else []
        labelled = sampling | ({"logprob_token_ids": ids} if ids else {})
        if self.choices:  # vLLM has no logits of the free model for a limited answer
            free = labelled | {"max_tokens": 1}
            limited = sampling | request_choice(self.choices)
            steps = self.ask(prompts, free) if first else []
            answers = self.ask(prompts, limited)
        else:
            steps = answers = self.ask(prompts, labelled)
        if first:
            first(context, read_logits(steps, ids))
        longest = max(len(answer["tokens"]) for answer in answers)
        new = torch.full((len(answers), longest), self.tokenizer.pad_token_id)
        for row, answer in zip(new, answers, strict=True):
            row[: len(answer["tokens"])] = torch.tensor(answer["tokens"])
        return torch.cat([context, new], dim=1)

    def ask(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
        return self.worker.answer(prompts, self.adapter, sampling, self.max_length)


def read_logits(answers: list[dict[str, Any]], ids: list[int]) -> torch.Tensor:
    """(rows, vocabulary up to the last of `ids`) logits of the first new tokens; -inf for others.

    Shares of labels depend on the difference of two logits alone.
    """
    logits = torch.full((len(answers), max(ids) + 1), -torch.inf)
    for row, answer in zip(logits, answers, strict=True):
        row[ids] = torch.tensor([answer["logits"][0][str(token)] for token in ids])
    return logits
