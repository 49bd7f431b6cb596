"""The tasks of fixtures/tasks for lm-evaluation-harness: `scores` of any of its models."""

import json
import pathlib
import tempfile

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

TASKS = pathlib.Path(__file__).parent.parent / "fixtures/tasks"


def mc2(doc, results):
    odds = np.exp([log_likelihood for log_likelihood, _ in results])
    return {"mc2": float(odds[np.array(doc["labels"]) == 1].sum() / odds.sum())}


def configs(folder):
    """Names, files and settings of the tasks; those that are made of others lie in a folder."""
    choices = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_text": "{{prompt}}"}
    both = [{"metric": "acc"}, {"metric": "acc_norm"}]
    yield "choices", TASKS / "choices.jsonl", {**choices, "doc_to_target": "{{answer}}", "metric_list": both}
    mean = [{"metric": "mc2", "aggregation": "mean", "higher_is_better": True}]
    truths = {"doc_to_target": 0, "process_results": mc2, "metric_list": mean}
    yield "truths", TASKS / "truths.jsonl", {**choices, **truths}
    yield "contexts", TASKS / "contexts.jsonl", {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["answer"],
        "doc_to_choice": lambda doc: doc["contexts"],
        "doc_to_target": lambda doc: doc["continuation"],
        "metric_list": [{"metric": "acc"}],
    }
    # A filter is a task's there, a line's here: lines of one filter make a file.
    lines = [json.loads(line) for line in (TASKS / "answers.jsonl").open()]
    for take in "first", "last":
        part = [line for line in lines if line.get("take", "first") == take]
        path = folder / f"answers-{take}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in part))
        extract = {"function": "regex", "regex_pattern": part[0]["extract"], "group_select": -1 if take == "last" else 0}
        exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
        yield f"answers-{take}", path, {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "do_sample": False, "max_gen_toks": 24},
            "filter_list": [{"name": "extract", "filter": [extract, {"function": "take_first"}]}],
            "metric_list": [exact],
        }


def scores(lm):
    """Every metric of every task."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = {}
        for name, path, config in configs(pathlib.Path(folder)):
            data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
            tasks[name] = ConfigurableTask(config={"task": name, "num_fewshot": 0, **data, **config})
        for name, results in evaluate(lm, tasks, bootstrap_iters=0)["results"].items():
            for key, value in results.items():
                metric = key.split(",")[0]
                if metric in ("acc", "acc_norm", "mc2", "exact_match"):
                    found[f"{name} {metric}"] = value
    return found
