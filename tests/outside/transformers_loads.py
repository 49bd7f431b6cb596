"""Loads checkpoints with Hugging Face transformers and compressed-tensors, in f32, and prints what their logits say.
QUANT=OTHER, two checkpoints of one scheme, also says how far their logits are apart: of equal tensors, not at all.

pip install torch==2.14.0 transformers==5.17.0 compressed-tensors==0.19.0 safetensors
python transformers_loads.py BASE QUANT[=OTHER]... (folders; windows: ../fixtures/goldens/test_windows.safetensors)
"""

import math
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WINDOWS = pathlib.Path(__file__).parent.parent / "fixtures/goldens/test_windows.safetensors"


def logits_of(folder):
    """Behind every token of the windows but their last ones: [tokens, vocab] in f64."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(loading.values()), loading
    with torch.no_grad():
        return torch.cat([model.eval()(w[None]).logits[0, :-1].double() for w in windows])


def differing(folder, other):
    """How many tensors of a checkpoint differ from the other's of the same names, and how many there are."""
    ours, theirs = (load_file(pathlib.Path(f) / "model.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys()
    raw = lambda tensor: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sum(raw(ours[name]) != raw(theirs[name]) for name in ours), len(ours)


windows = load_file(WINDOWS)["windows"].long()
targets = windows[:, 1:].flatten()
base = torch.log_softmax(logits_of(sys.argv[1]), -1)
perplexity = lambda p: math.exp(-p[torch.arange(len(targets)), targets].mean().item())
print(sys.argv[1], "perplexity", perplexity(base))
for folder, _, other in (argument.partition("=") for argument in sys.argv[2:]):
    logits = logits_of(folder)
    quant = torch.log_softmax(logits, -1)
    kl = (base.exp() * (base - quant)).sum(-1).sort().values
    rank = lambda share: kl[math.ceil(share * len(kl)) - 1].item()
    agree = (base.argmax(-1) == quant.argmax(-1)).double().mean().item()
    print(folder, "perplexity", perplexity(quant), "KL", kl.mean().item(), rank(0.5), rank(0.99), "agree", agree)
    if other:
        others = logits_of(other)
        (count, total), apart = differing(folder, other), (logits - others).abs().max().item()
        print(f"  {count} of {total} tensors differ from {other}'s, logits by {apart} at most,", end=" ")
        print("perplexity", perplexity(torch.log_softmax(others, -1)))
        assert count > 0 or apart == 0
