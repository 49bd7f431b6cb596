"""Times torch's matrix products, which are cuBLASLt's, beside those that `quaver bench gemm` has measured.

gpu-check-torch.py CSV FIRST: for every row of `quaver bench`'s file behind its first FIRST lines that is the time of a
Linear, appends a row with torch's time of the same shape and its share of the same floor.
"""

import csv
import sys
import time

import torch

SHAPES = {"qkv_proj": (3072, 2048), "o_proj": (2048, 2048), "gate_up_proj": (16384, 2048), "down_proj": (2048, 8192)}
WEIGHTS = 256 << 20  # Bytes of weights that one run goes through, as in tools/bench/gemm.rs.


def product(n, k, m, dtype):
    """A function that multiplies with weights that were not read just before, and how often it does so."""
    size = 1 if dtype == "fp8" else 2
    copies = -(-WEIGHTS // (n * k * size))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    if dtype == "bf16":
        return lambda: [x @ w.T for w in weights], copies
    one = torch.ones((), device="cuda")
    x, weights = x.to(torch.float8_e4m3fn), [w.to(torch.float8_e4m3fn) for w in weights]

    def run():
        for w in weights:
            torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False)

    return run, copies


def seconds(run, copies):
    """Of one product: the median of three measurements of at least 50 ms."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def once(times):
        start = time.perf_counter()
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    once(1)
    times = max(1, int(0.05 / once(1)) + 1)
    return sorted(once(times) / times / copies for _ in range(3))[1]


def main():
    path, first = sys.argv[1], int(sys.argv[2])
    with open(path, newline="") as file:
        rows = list(csv.reader(file))[first:]
    for row in rows:
        if not row[7].startswith("linear ") or row[8] != "time":
            continue
        _, name, dtype, m = row[7].split()
        n, k = SHAPES[name]
        m = int(m[1:])
        floor = float(row[10]) * float(row[11])
        # cuBLASLt takes FP8 rows in sixteens.
        rows_taken = -(-m // 16) * 16 if dtype == "fp8" else m
        us = 1e6 * seconds(*product(n, k, rows_taken, dtype))
        row[8], row[10], row[11] = "torch_time", f"{us:.3f}", f"{floor / us:.6f}"
        with open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


main()
