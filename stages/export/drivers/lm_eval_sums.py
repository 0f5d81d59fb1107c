"""Ask problems by lm-eval's own harness, as `lm_eval --model hf` would with a task in YAML.

Job: `bundle`, `problems` (`prompt`, `answer`), `max_new_tokens`.
Answer: `versions`, `texts` (what the model answered), `verdicts` (exact match, by the harness).
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASK = "ingot_problems"
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: []
  max_gen_toks: {max_new_tokens}
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def main(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The answer to a job; the task and its problems are written into `folder`."""
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps(one) + "\n" for one in job["problems"]))
    text = YAML.format(task=TASK, file=problems, max_new_tokens=job["max_new_tokens"])
    (folder / f"{TASK}.yaml").write_text(text)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": job["bundle"], "dtype": "float32", "device": "cpu"},
        tasks=[TASK],
        batch_size=16,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return {
        "versions": {"lm_eval": importlib.metadata.version("lm_eval")},
        "texts": [sample["resps"][0][0] for sample in samples],
        "verdicts": [bool(sample["exact_match"] == 1.0) for sample in samples],
    }


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
    Path(sys.argv[2]).write_text(json.dumps(answer))
