"""Quantizes random weights of every dtype with compressed-tensors: fixtures/goldens/quantized-weights.safetensors.

pip install compressed-tensors==0.19.0 safetensors
"""

import pathlib

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

torch.manual_seed(1)
tensors = {}
for name, dtype in ("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32):
    # Rows of all magnitudes, one of zeros, one with negative zeros, one whose largest value is the largest code.
    weight = torch.randn(24, 48) * torch.logspace(-4, 2, 24)[:, None]
    weight[3] = 0
    weight[4, ::2] = -0.0
    weight[5, 0] = 448.0
    weight[6] = torch.linspace(-1, 1, 48)
    weight = weight.to(dtype)
    tensors[f"{name}.weight"] = weight
    for strategy in "tensor", "channel":
        args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, dynamic=False)
        over = {"dim": 1, "keepdim": True} if strategy == "channel" else {}
        shape = (-1, 1) if strategy == "channel" else (1,)
        scale, zero = calculate_qparams(weight.amin(**over).reshape(shape), weight.amax(**over).reshape(shape), args)
        codes = quantize(x=weight, scale=scale, zero_point=zero, args=args, dtype=torch.float8_e4m3fn)
        tensors[f"{name}.{strategy}.scale"], tensors[f"{name}.{strategy}.codes"] = scale, codes
save_file(tensors, pathlib.Path(__file__).parent.parent / "fixtures/goldens/quantized-weights.safetensors")
