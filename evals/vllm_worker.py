"""Answers prompts with vLLM. Runs in vLLM's own Python (evals/vllm_model.py starts it).

It reads lines of JSON from its standard input and writes a line for each to its standard output:

    {"model": "models/smollm2-135m", "dtype": "float32", …}       the arguments of vllm.LLM
    {"ready": true}
    {"prompts": [[1, 42], …], "adapter": "path", "sampling": {"max_tokens": 10}}
    {"answers": [{"tokens": [3559], "logits": [{"3559": 17.2}]}, …]}

`logits` are those of each new token that `sampling` asks for as `logprob_token_ids`; its
`structured_outputs` limit the answers. An error is a line {"error": "…"}. The end of the input ends
the worker.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    # vLLM and its processes write to the standard output; answers go to a copy of it.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(content: dict[str, Any]) -> None:
        output.write(json.dumps(content) + "\n")
        output.flush()

    try:
        from vllm import LLM

        engine = LLM(**json.loads(sys.stdin.readline()))
        reply({"ready": True})
        for line in sys.stdin:
            reply({"answers": answer(engine, json.loads(line))})
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        raise


def answer(engine: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    path, sampling = request["adapter"], request["sampling"]
    if "structured_outputs" in sampling:
        sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
    engine.reset_prefix_cache()  # prompts share a cache within a request, and time the same in each
    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]],
        SamplingParams(**sampling),
        lora_request=LoRARequest("adapter", 1, path) if path else None,
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        first = output.outputs[0]
        steps = first.logprobs or []
        logits = [{token: entry.logprob for token, entry in step.items()} for step in steps]
        answers.append({"tokens": list(first.token_ids), "logits": logits})
    return answers


if __name__ == "__main__":
    main()
