"""Serving under load, ours beside llama.cpp's server and transformers' generate on the same weights, as ratios.

    jaxlm import --from=SmolLM2-135M-Instruct.Q4_1.gguf --to=runs/smol && jaxlm export --workdir=runs/smol --to=exports/smol
    jaxlm export --workdir=runs/smol --to=exports/smol-f16.gguf --dtype=float16
    python tools/bench_serve.py --workdir=runs/smol --hf=exports/smol --gguf=exports/smol-f16.gguf --python=python_with_torch_and_xllamacpp

Each of --clients clients sends --requests requests one after the other over loopback from this process: --prompt random tokens, no two alike, then --tokens
tokens, greedy, streamed. The servers are processes of their own; the idle ones sleep. They take turns, --rounds times; of each figure the best round is
shown, and ratios between systems of one round. transformers has no server: all clients' prompts are one batch of its generate, and its first token is what
generating one token takes. --gguf may be given several times. Figures of a shared machine do not compare with another day's; ratios do.
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]

LLAMA = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.port, p.hostnames = sys.argv[1], int(sys.argv[3]) * int(sys.argv[2]), int(sys.argv[2]), 0, ["127.0.0.1"]
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[4])
p.cont_batching = True
server = x.Server(p)
print("READY", server.listening_address, flush=True)
sys.stdin.read()
"""

TRANSFORMERS = """
import json, sys, time, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print("READY", flush=True)
for line in sys.stdin:
    rows, new = json.loads(line)
    ids = torch.tensor(rows)
    with torch.no_grad():
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, min_new_tokens=1, do_sample=False)
        first = time.perf_counter() - begun
        begun = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    print(json.dumps([first, time.perf_counter() - begun]), flush=True)
"""


class Child:
    """A process that says READY, and where it listens."""

    def __init__(self, *command: str, env: dict[str, str] | None = None):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        while not (line := self.process.stdout.readline()).startswith("READY") and "/v1" not in line:
            assert line or self.process.poll() is None, f"{command[:3]} ended"
        self.address = next((word for word in line.split() if word.startswith("http")), "").removesuffix("/v1")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def prompts(count: int, size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 40000) for _ in range(size)] for _ in range(count)]


async def client(address: str, rows: list[list[int]], new: int, first: list[float], between: list[float], counts: list[int]) -> None:
    host, port = address.removeprefix("http://").split(":")
    for row in rows:
        body = json.dumps({"prompt": row, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True,
                           "stream_options": {"include_usage": True}}).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        last = time.perf_counter()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        seen = 0
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event, now = json.loads(line[6:]), time.perf_counter()
            assert "error" not in event, event
            if event.get("usage"):
                counts.append(event["usage"]["completion_tokens"])
            if event["choices"]:
                (between if seen else first).append(now - last)
                seen, last = seen + 1, now
        writer.close()


def load(address: str, clients: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Tokens per second, and times in ms, of one load."""
    rows, first, between, counts = prompts(clients * args.requests, args.prompt, seed), [], [], []

    async def all_clients() -> None:
        await asyncio.gather(*(client(address, rows[i::clients], args.tokens, first, between, counts) for i in range(clients)))

    begun = time.perf_counter()
    asyncio.run(all_clients())
    seconds = time.perf_counter() - begun
    assert counts == [args.tokens] * len(rows), counts
    share = lambda values, p: 1e3 * statistics.quantiles(values, n=20, method="inclusive")[p // 5 - 1] if len(values) > 1 else 1e3 * values[0]
    return {"tokens/s": sum(counts) / seconds, "first p50": share(first, 50), "first p95": share(first, 95),
            "next p50": share(between, 50), "next p95": share(between, 95)}


def batch(child: Child, clients: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    child.process.stdin.write(json.dumps([prompts(clients, args.prompt, seed), args.tokens]) + "\n")
    child.process.stdin.flush()
    first, seconds = json.loads(child.process.stdout.readline())
    each = 1e3 * (seconds - first) / (args.tokens - 1)
    return {"tokens/s": clients * args.tokens / seconds, "first p50": 1e3 * first, "first p95": 1e3 * first, "next p50": each, "next p95": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--hf", default="")
    parser.add_argument("--gguf", action="append", default=[])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has torch, transformers and xllamacpp")
    for name, default in (("prompt", 64), ("tokens", 48), ("requests", 1), ("rounds", 2), ("threads", os.cpu_count())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clients", type=lambda text: list(map(int, text.split(","))), default=[1, 8, 32])
    args = parser.parse_args()
    most, room = max(args.clients), -(-(args.prompt + args.tokens + 16) // 256) * 256
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    children = {"jaxlm f32": Child(sys.executable, "-m", "jaxlm", "serve", f"--workdir={args.workdir}", "--port=0", f"--rows={most}", "--cache_gib=2", env=env)}
    children |= {f"llama.cpp {pathlib.Path(path).stem}": Child(args.python, "-c", LLAMA, path, str(most), str(room), str(args.threads)) for path in args.gguf}
    children |= {"transformers f32": Child(args.python, "-c", TRANSFORMERS, args.hf, str(args.threads))} if args.hf else {}
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    try:
        for clients in args.clients:
            for turn in range(args.rounds + 1):  # the first is not counted: it compiles
                for name, child in children.items():
                    seed = clients * 1000 + turn
                    figures = load(child.address, clients, args, seed) if child.address else batch(child, clients, args, seed)
                    if turn:
                        found.setdefault((clients, name), []).append(figures)
            show(clients, found, list(children))
    finally:
        for child in children.values():
            child.end()


def show(clients: int, found: dict, names: list[str]) -> None:
    keys = list(found[clients, names[0]][0])
    print(f"\n{clients} client{'s' * (clients > 1)}" + " " * 20 + "".join(f"{key:>12}" for key in keys) + f"{'ours / it':>14}", flush=True)
    for name in names:
        rounds = found[clients, name]
        best = [(max if key == "tokens/s" else min)(one[key] for one in rounds) for key in keys]
        ratio = statistics.median(ours["tokens/s"] / it["tokens/s"] for ours, it in zip(found[clients, names[0]], rounds))
        print(f"{name:<29}" + "".join(f"{value:12.1f}" for value in best) + f"{ratio:14.2f}", flush=True)


if __name__ == "__main__":
    main()
