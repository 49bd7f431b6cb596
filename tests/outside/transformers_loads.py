"""Loads checkpoints with Hugging Face transformers and compressed-tensors, in f32, and prints what their logits say.

pip install torch==2.14.0 transformers==5.17.0 compressed-tensors==0.19.0 safetensors
python transformers_loads.py BASE QUANT... (folders; windows: ../fixtures/goldens/test_windows.safetensors)
"""

import math
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WINDOWS = pathlib.Path(__file__).parent.parent / "fixtures/goldens/test_windows.safetensors"


def log_probabilities(folder, windows):
    """[tokens, vocab] in f64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat([torch.log_softmax(model(w[None]).logits[0, :-1].double(), -1) for w in windows])


windows = load_file(WINDOWS)["windows"].long()
targets = windows[:, 1:].flatten()
base = log_probabilities(sys.argv[1], windows)
perplexity = lambda p: math.exp(-p[torch.arange(len(targets)), targets].mean().item())
print(sys.argv[1], "perplexity", perplexity(base))
for folder in sys.argv[2:]:
    quant = log_probabilities(folder, windows)
    kl = (base.exp() * (base - quant)).sum(-1).sort().values
    rank = lambda share: kl[math.ceil(share * len(kl)) - 1].item()
    agree = (base.argmax(-1) == quant.argmax(-1)).double().mean().item()
    print(folder, "perplexity", perplexity(quant), "KL", kl.mean().item(), rank(0.5), rank(0.99), "agree", agree)
