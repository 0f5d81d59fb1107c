"""What a card says of programs: who loads the bundle, who does not and why, how to start them."""

import math
from collections.abc import Iterator

from configs.delivery import Target
from configs.model import ModelConfig, V4Config
from stages.export.rules import INT8, Program
from stages.export.servers import Verdict, verdicts

_INGOT = """\
```sh
ingot sample . --prompt "..."
```"""
_MEMORY = """\
Neither transformers nor the servers know this memory: who does not stop at it would leave it out,
and answer with another model."""
_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
```
transformers needs `accelerate` for the FP8 variant, which it widens to bfloat16 without a GPU; it
{mtp}."""
_MTP = {"v4": "ignores the tensors of the MTP layer"}
"""What transformers does with the MTP layer, where it is not what it does in V3."""
_MTP_V3 = "reports the tensors of the MTP layer as unexpected and does not use them"
_SHELL = {
    "vllm": "vllm serve . --served-model-name ingot",
    "sglang": "python -m sglang.launch_server --model-path . --served-model-name ingot",
}
_ENDS = {
    "refuses": "",
    "misreads": ": it would compute wrongly, without a word",
    "changes": ": it would answer as another model, with a warning",
}


def describe(model: ModelConfig, target: Target, variant: str) -> str:
    """Markdown: a table of programs, and the commands of those that no known rule keeps away."""
    judged = verdicts(model, target, variant)
    commands = list(_commands(model, judged, target, variant))
    if model.engram:
        commands = [f"{_INGOT}\n{_MEMORY}"]
    return "\n\n".join([*commands, _table(judged)])


def _table(judged: tuple[Verdict, ...]) -> str:
    rows = "".join(
        f"| {one.server.title} | {_judgement(one)} | {one.evidence} |\n" for one in judged
    )
    return f"""\
Who loads this bundle, as far as its sizes and parts decide it. Of a program that was not tried on
such bundles nothing is promised: it is listed by what its source says.

| program | loads this bundle | known |
|---|---|---|
{rows}"""


def _judgement(one: Verdict) -> str:
    """Yes or no, and why; of what was not tried, that nothing known speaks against it."""
    if not one.serves:
        against = one.of("refuses", "misreads", "changes")
        told = (f"{it.found} (wants {it.rule.wants}){_ENDS[it.rule.effect]}" for it in against)
        return f"no: {', '.join(told)}"
    answer = "yes" if one.was_tried else "not tried; breaks no known rule"
    return "; ".join([answer, *(breach.rule.wants for breach in one.of("omits", "needs"))])


def _commands(
    model: ModelConfig, judged: tuple[Verdict, ...], target: Target, variant: str
) -> Iterator[str]:
    """How to start each program that has a command and that nothing known keeps away."""
    serving: set[Program] = {one.program for one in judged if one.serves}
    if shell := [line for name, line in _SHELL.items() if name in serving]:
        yield "\n".join(["```sh", *shell, "```"])
    if "transformers" in serving and target == "cuda":
        yield _TRANSFORMERS.format(mtp=_MTP.get(model.family, _MTP_V3))
    if "vllm-ascend" in serving and target == "ascend":
        yield _ascend(model, variant)


def _ascend(model: ModelConfig, variant: str) -> str:
    """As vllm-ascend's own pages start the released model of the family, for one machine of eight
    NPUs; sizes are the model's."""
    heads = math.gcd(8, model.num_attention_heads)
    is_v4, is_int8 = isinstance(model, V4Config), variant in INT8
    variables = ["HCCL_OP_EXPANSION_MODE=AIV", f"HCCL_BUFFSIZE={1024 if is_v4 else 200}"]
    variables += ["VLLM_ASCEND_ENABLE_MLAPO=1"] if is_int8 and not is_v4 else []
    flags = [
        f"--served-model-name ingot --tensor-parallel-size {heads} --enable-expert-parallel",
        f"--max-model-len {model.max_position_embeddings} --gpu-memory-utilization 0.9",
        """--compilation-config '{"cudagraph_mode": "FULL_DECODE_ONLY"}'""",
    ]
    extra = ["--block-size 128"] * is_v4 + ["--quantization ascend"] * is_int8
    flags += [" ".join(extra)] if extra else []
    if model.num_nextn_predict_layers:
        method, drafts = ("mtp", 1) if is_v4 else ("deepseek_mtp", 3)
        flags.append(
            "--speculative-config "
            f"""'{{"num_speculative_tokens": {drafts}, "method": "{method}"}}'"""
        )
    lines = [f"export {variable}" for variable in variables]
    lines.append(" \\\n  ".join(["vllm serve .", *flags]))
    return "\n".join(["```sh", *lines, "```", "with vllm-ascend installed."])
