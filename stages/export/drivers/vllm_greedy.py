"""Continue with vLLM on a CPU, in float32 through its MLA path: offline, with drafts, or by HTTP.

Job: as for transformers, and `mode`: "offline", "drafts" (the MTP layer proposes, the model
decides) or "http" (a server on 127.0.0.1, asked ids, texts and conversations).
Answer: `versions`, `answers`, and where texts are encoded `encoded`, `rendered`, `answered_texts`.

vLLM's rotary kernel for CPUs leaves all but some heads of DeepSeek's queries unrotated, so that the
plain one is asked for.
"""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
COMPILATION = {"custom_ops": ["all", "-rotary_embedding"]}
START_SECONDS, ANSWER_SECONDS = 400.0, 200.0


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job."""
    made = by_http(job) if job["mode"] == "http" else offline(job)
    return {"versions": {"vllm-cpu": importlib.metadata.version("vllm-cpu")}, **made}


def offline(job: dict[str, Any]) -> dict[str, Any]:
    """By ids, through the engine in this process; texts through its tokenizer."""
    from vllm import LLM, SamplingParams

    drafts = job["mode"] == "drafts"
    more = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if drafts else {}
    llm = LLM(
        model=job["bundle"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=context(job),
        compilation_config=COMPILATION,
        disable_log_stats=not drafts,
        **more,
    )
    if not llm.llm_engine.vllm_config.model_config.use_mla:
        raise RuntimeError("vLLM did not take its MLA path, which is what was to be tried")
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_new_tokens"], stop_token_ids=job["stop_tokens"]
    )
    asked = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    found = llm.generate(asked, sampling, use_tqdm=False)
    made: dict[str, Any] = {"answers": [list(one.outputs[0].token_ids) for one in found]}
    if drafts:
        return made | {"checks": [drafted(llm)]}
    tokenizer = llm.get_tokenizer()
    made["encoded"] = [tokenizer(text)["input_ids"] for text in job["texts"]]
    made["rendered"] = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]
        for one in job["conversations"]
    ]
    return made


def drafted(llm: Any) -> dict[str, Any]:
    """How many of the tokens that the MTP layer proposed the model took."""
    counts = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    proposed = int(counts["vllm:spec_decode_num_draft_tokens"])
    taken = int(counts["vllm:spec_decode_num_accepted_tokens"])
    if not proposed:
        raise RuntimeError("vLLM proposed no drafts, so that nothing was shown of the MTP layer")
    return {"what": "drafts taken", "equal": taken, "of": proposed, "required": False}


def by_http(job: dict[str, Any]) -> dict[str, Any]:
    """Through a server of this process's own, which ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-I", "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", job["bundle"], "--served-model-name", "ingot", "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", str(context(job))]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    words += ["--compilation-config", json.dumps(COMPILATION)]
    server = subprocess.Popen(words)
    try:
        base = f"http://127.0.0.1:{port}"
        wait(server, base)
        return asked(base, job)
    finally:
        server.terminate()
        server.wait()


def wait(server: "subprocess.Popen[bytes]", base: str) -> None:
    """Until the server says that it is ready."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):
                return
        except OSError:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"no server within {START_SECONDS:g} s") from None
            time.sleep(1)


def asked(base: str, job: dict[str, Any]) -> dict[str, Any]:
    """Ids, texts and conversations."""
    common = {
        "model": "ingot",
        "max_tokens": job["max_new_tokens"],
        "temperature": 0,
        "stop_token_ids": job["stop_tokens"],
        "return_token_ids": True,
    }
    by_ids = post(f"{base}/v1/completions", common | {"prompt": job["prompts"]})["choices"]
    by_text = post(f"{base}/v1/completions", common | {"prompt": job["texts"]})["choices"]
    chats = [
        post(f"{base}/v1/chat/completions", common | {"messages": one, "max_tokens": 1})
        for one in job["conversations"]
    ]
    for choices in (by_ids, by_text):
        choices.sort(key=lambda choice: choice["index"])
    return {
        "answers": [one["token_ids"] for one in by_ids],
        "encoded": [one["prompt_token_ids"] for one in by_text],
        "answered_texts": [one["token_ids"] for one in by_text],
        "rendered": [one["prompt_token_ids"] for one in chats],
    }


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the server answers."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        said: dict[str, Any] = json.load(answer)
        return said


def context(job: dict[str, Any]) -> int:
    """Tokens that the longest prompt, its answer and a draft take, within those of the model."""
    config = json.loads(Path(job["bundle"], "config.json").read_text())
    needed = max(map(len, [*job["prompts"], *job["texts"]])) + job["max_new_tokens"]
    return int(min(config["max_position_embeddings"], max(128, needed)))


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
