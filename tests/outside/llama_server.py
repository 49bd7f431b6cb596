"""Speed of `quaver serve` beside llama-server (llama.cpp, Q8_0), alternately in one run, by two clients: OpenAI's, and
`quaver bench serve`.

    pip install gguf numpy openai
    quaver synth MODEL --shape llama-3.2-1b --scheme fp8-channel
    python llama_server.py gguf MODEL MODEL.gguf
    python llama_server.py measure --quaver QUAVER --llama-server LLAMA_SERVER MODEL MODEL.gguf

`gguf` writes the same weights as Q8_0, norms as f32. `measure` starts both servers, warms them up, lets each rest while
the other is asked, and prints the output tokens a second and the time to the first token of 1 and of 16 streams, sampled alike
(llama-server's defaults), and the median of the ratios of runs that followed one another: machines are noisy.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np


def e4m3_values():
    """The values of all codes, OCP FP8 E4M3."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)
    return np.where(codes & 128, -values, values).astype(np.float32)


def tensors(folder):
    """A function that gives a tensor of a checkpoint as f32, scaled where it has a scale."""
    data = np.memmap(folder / "model.safetensors", dtype=np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    table = e4m3_values()

    def get(name):
        start, end = (8 + size + at for at in header[name]["data_offsets"])
        raw, dtype = data[start:end], header[name]["dtype"]
        if dtype == "F8_E4M3":
            values = table[raw]
        elif dtype == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
        values = values.reshape(header[name]["shape"])
        scale = name + "_scale"
        return values * get(scale) if scale in header else values

    return get


def write_gguf(folder, path):
    import gguf

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    get = tensors(folder)
    heads, kv_heads, layers = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    vocab = dict(tokenizer["model"]["vocab"])
    special = {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    names = {id: text for text, id in {**vocab, **special}.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([names.get(id, f"<unused_{id}>") for id in range(config["vocab_size"])])
    control = set(special.values())
    kind = gguf.TokenType
    writer.add_token_types([kind.CONTROL if id in control else kind.NORMAL for id in range(config["vocab_size"])])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)

    def matrix(name, values):
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)

    def permuted(values, heads):
        """Rotated pairs side by side, as llama.cpp has them."""
        rows, cols = values.shape
        return values.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)

    matrix("token_embd.weight", get("model.embed_tokens.weight"))
    writer.add_tensor("output_norm.weight", get("model.norm.weight"))
    for layer in range(layers):
        here, there = f"model.layers.{layer}.", f"blk.{layer}."
        writer.add_tensor(there + "attn_norm.weight", get(here + "input_layernorm.weight"))
        writer.add_tensor(there + "ffn_norm.weight", get(here + "post_attention_layernorm.weight"))
        for ours, theirs in [("q", heads), ("k", kv_heads)]:
            matrix(there + f"attn_{ours}.weight", permuted(get(here + f"self_attn.{ours}_proj.weight"), theirs))
        matrix(there + "attn_v.weight", get(here + "self_attn.v_proj.weight"))
        matrix(there + "attn_output.weight", get(here + "self_attn.o_proj.weight"))
        for name in ("gate", "up", "down"):
            matrix(there + f"ffn_{name}.weight", get(here + f"mlp.{name}_proj.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def started(command, port):
    """A server that answers."""
    environment = {**os.environ, "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive"}
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                if answer.status == 200:
                    return process, time.monotonic() - begin
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {process.returncode}")
            time.sleep(0.01)


async def by_openai(port, streams, words, tokens, requests, seed):
    """Streams of OpenAI's client: (output tokens a second, median ms to the first token)."""
    import openai

    rng = np.random.default_rng(seed)
    firsts, counts, turn = [], [], asyncio.Semaphore(streams)
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=1200) as client:
        model = (await client.models.list()).data[0].id

        async def ask(prompt):
            async with turn:
                begin, count = time.monotonic(), 0
                stream = await client.completions.create(
                    model=model, prompt=prompt, max_tokens=tokens, stream=True, temperature=1, top_p=0.95,
                    extra_body={"ignore_eos": True, "top_k": 40, "min_p": 0.05},
                )
                async for event in stream:
                    if event.choices:
                        count += 1
                        if count == 1:
                            firsts.append(1000 * (time.monotonic() - begin))
                counts.append(tokens)

        alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        prompts = [" ".join("".join(rng.choice(alphabet, 3)) for _ in range(words)) for _ in range(requests)]
        begin = time.monotonic()
        await asyncio.gather(*(ask(prompt) for prompt in prompts))
        return sum(counts) / (time.monotonic() - begin), statistics.median(firsts)


def by_quaver(quaver, port, streams, words, tokens, requests, seed):
    """The same by `quaver bench serve`."""
    load = [f"--concurrency={streams}", f"--requests={requests}", f"--prompt-words={words}", f"--max-tokens={tokens}"]
    command = [quaver, "bench", "serve", f"--url=http://127.0.0.1:{port}", *load, f"--seed={seed}", "--json"]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert answer["failed"] == 0, answer
    return answer["output_tokens_per_s"], answer["ttft_ms"]["p50"]


def measure(args):
    places = 16 * (4 * args.words + args.tokens + 64)
    flags = ["-t", str(args.threads), "-tb", str(args.threads), "-np", "16", "-c", str(places), "--no-warmup"]
    servers = {
        "quaver": ([args.quaver, "serve", "--model", args.model, "--backend", "cpu", "--threads", str(args.threads),
                    "--port", "18071", "--max-model-len", str(places // 16)], 18071),
        "llama-server Q8_0": ([args.llama_server, "-m", args.gguf, "--port", "18072", *flags], 18072),
    }
    running = {}
    try:
        for name, (command, port) in servers.items():
            running[name], seconds = started(command, port)
            print(f"{name}: ready after {seconds:.2f} s", flush=True)
        clients = {
            "openai": lambda *load: asyncio.run(by_openai(*load)),
            "bench serve": lambda *load: by_quaver(args.quaver, *load),
        }
        print("| client | streams | server | output tok/s | first token, ms |\n|---|---|---|---|---|")
        for client, ask in clients.items():
            for streams, requests in [(1, 1), (16, 16)]:
                figures = {name: [] for name in servers}
                for repeat in range(args.repeats):
                    for name, (_, port) in servers.items():
                        figures[name].append(ask(port, streams, args.words, args.tokens, requests, repeat + 1))
                for name, runs in figures.items():
                    speed, first = (statistics.median(column) for column in zip(*runs))
                    print(f"| {client} | {streams} | {name} | {speed:.1f} | {first:.0f} |", flush=True)
                ours, theirs = figures.values()
                ratio = statistics.median(a[0] / b[0] for a, b in zip(ours, theirs))
                print(f"| {client} | {streams} | ratio, median of pairs | {ratio:.2f} | |", flush=True)
    finally:
        for process in running.values():
            process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    gguf = commands.add_parser("gguf")
    gguf.add_argument("model", type=Path)
    gguf.add_argument("gguf", type=Path)
    gguf.set_defaults(run=lambda args: write_gguf(args.model, args.gguf))
    speed = commands.add_parser("measure")
    speed.add_argument("--quaver", required=True)
    speed.add_argument("--llama-server", required=True)
    speed.add_argument("--threads", type=int, default=os.cpu_count())
    speed.add_argument("--words", type=int, default=32)
    speed.add_argument("--tokens", type=int, default=48)
    speed.add_argument("--repeats", type=int, default=2)
    speed.add_argument("model")
    speed.add_argument("gguf")
    speed.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


main()
