"""Encode, render and continue with transformers, in float32 on a CPU.

Job: `bundle`, `texts`, `conversations`, `prompts` (ids), `max_new_tokens`, `stop_tokens`.
Answer: `versions`, `encoded`, `rendered`, `answers`, each one list of ids a text, conversation or
prompt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    torch.set_num_threads(job["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(job["bundle"])
    # Products of float32 on both sides: only then must every token be equal.
    widened = {}
    config = json.loads(Path(job["bundle"], "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") == "fp8":
        widened = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(job["bundle"], dtype=torch.float32, **widened)
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "encoded": [tokenizer(text)["input_ids"] for text in job["texts"]],
        "rendered": [
            tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]
            for one in job["conversations"]
        ],
        "answers": continued(model.float().eval(), job),
    }


@torch.no_grad()
def continued(model: Any, job: dict[str, Any]) -> list[list[int]]:
    """Greedy answers; prompts of equal length go together, so that nothing is padded."""
    stops = set(job["stop_tokens"])
    answers: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in job["prompts"]}:
        places = [n for n, prompt in enumerate(job["prompts"]) if len(prompt) == length]
        prompt_BS = torch.tensor([job["prompts"][n] for n in places])
        found = model.generate(
            prompt_BS,
            attention_mask=torch.ones_like(prompt_BS),
            max_new_tokens=job["max_new_tokens"],
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(stops),
            pad_token_id=min(stops),
        )
        for place, row in zip(places, found[:, length:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in stops), len(row) - 1)
            answers[place] = row[: end + 1]
    return [answers[n] for n in range(len(job["prompts"]))]


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
