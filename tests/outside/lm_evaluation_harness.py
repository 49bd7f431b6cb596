"""Scores fixtures/tasks with lm-evaluation-harness.

pip install lm-eval==0.4.13 transformers==5.17.0
HF_HUB_OFFLINE=1 python lm_evaluation_harness.py MODEL
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

TASKS = pathlib.Path(__file__).parent.parent / "fixtures/tasks"
lm = HFLM(pretrained=sys.argv[1], dtype="float32", add_bos_token=True, batch_size=1, device="cpu")


def mc2(doc, results):
    odds = np.exp([log_likelihood for log_likelihood, _ in results])
    return {"mc2": float(odds[np.array(doc["labels"]) == 1].sum() / odds.sum())}


def score(name, path, **config):
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    task = ConfigurableTask(config={"task": name, "num_fewshot": 0, **data, **config})
    print(name, evaluate(lm, {name: task}, bootstrap_iters=0)["results"][name])


choices = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_text": "{{prompt}}"}
metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
score("choices", TASKS / "choices.jsonl", **choices, doc_to_target="{{answer}}", metric_list=metrics)
metrics = [{"metric": "mc2", "aggregation": "mean", "higher_is_better": True}]
score("truths", TASKS / "truths.jsonl", **choices, doc_to_target=0, process_results=mc2, metric_list=metrics)
score(
    "contexts",
    TASKS / "contexts.jsonl",
    output_type="multiple_choice",
    doc_to_text=lambda doc: doc["answer"],
    doc_to_choice=lambda doc: doc["contexts"],
    doc_to_target=lambda doc: doc["continuation"],
    metric_list=[{"metric": "acc"}],
)
# A filter is a task's there, a line's here: lines of one filter make a file.
lines = [json.loads(line) for line in (TASKS / "answers.jsonl").open()]
for last in False, True:
    part = [line for line in lines if (line.get("take") == "last") == last]
    path = pathlib.Path(tempfile.mkdtemp()) / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in part))
    extract = {"function": "regex", "regex_pattern": part[0]["extract"], "group_select": -1 if last else 0}
    score(
        f"answers, take last: {last}",
        path,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["."], "do_sample": False, "max_gen_toks": 24},
        filter_list=[{"name": "extract", "filter": [extract, {"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
    )
