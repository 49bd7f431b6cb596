"""Calibrates the fixture model with llm-compressor on the prompts of the goldens: fixtures/goldens/llm-compressor-scales.json.

pip install llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0
python llm_compressor_scales.py MODEL > ../fixtures/goldens/llm-compressor-scales.json
"""

import json
import pathlib
import sys

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

PROMPTS = pathlib.Path(__file__).parent.parent / "fixtures/goldens/prompts.json"

# Without shuffling, llm-compressor runs the longest sample first.
prompts = sorted((p for p in json.loads(PROMPTS.read_text()) if len(p["ids"]) <= 400), key=lambda p: -len(p["ids"]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", attn_implementation="eager")
ids = [p["ids"] for p in prompts]
recipe = QuantizationModifier(
    targets="Linear",
    scheme="FP8",
    ignore=["lm_head"],
    kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
)
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}),
    recipe=recipe,
    num_calibration_samples=len(ids),
    shuffle_calibration_samples=False,
    max_seq_length=4096,
)
tensors = list(model.named_parameters()) + list(model.named_buffers())
scales = {n: t.float().item() for n, t in tensors if n.endswith(("input_scale", "k_scale", "v_scale"))}
json.dump({"samples": [p["name"] for p in prompts], "scales": scales}, sys.stdout, indent=1)
