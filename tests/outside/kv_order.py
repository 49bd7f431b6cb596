"""The order in which llm-compressor ran the calibration samples of tiny-llama-fp8-kv: fixtures/kv-order.json, and the
file in that order, which `quaver quantize --kv-cache --batch-size 16` gives the checkpoint's scales with.

Where it does not shuffle, llm-compressor 0.14 sorts samples by length with torch.argsort(descending=True), which is not
stable: samples of one length, which these all are, change places too.

pip install torch==2.14.0
python kv_order.py CALIBRATION.jsonl [REORDERED.jsonl] > ../fixtures/kv-order.json
"""

import json
import pathlib
import sys

import torch

lines = [line for line in pathlib.Path(sys.argv[1]).read_text().splitlines() if line.strip()]
lengths = torch.tensor([len(json.loads(line)["input_ids"]) for line in lines])
order = torch.argsort(lengths, descending=True).tolist()
if len(sys.argv) > 2:
    pathlib.Path(sys.argv[2]).write_text("".join(lines[i] + "\n" for i in order))
print(json.dumps(order))
