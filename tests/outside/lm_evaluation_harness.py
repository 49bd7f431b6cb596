"""Scores fixtures/tasks with lm-evaluation-harness over Hugging Face transformers, in float32: the figures of
`tests/eval.rs` and `tests/clients/check.py`. MODEL is the bf16 fixture with the demo's tokenizer beside it.

pip install lm-eval==0.4.13 torch==2.14.0 transformers==5.17.0
HF_HUB_OFFLINE=1 python lm_evaluation_harness.py MODEL
"""

import json
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent / "clients"))

import harness
from lm_eval.models.huggingface import HFLM

lm = HFLM(pretrained=sys.argv[1], dtype="float32", add_bos_token=True, batch_size=1, device="cpu")
print(json.dumps(harness.scores(lm), indent=1))
