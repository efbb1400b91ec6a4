"""What Tink makes of a GPU: the Megatron trainer and real vLLM on random models, through the `tinker` SDK.

For each shape, in turn: a plain loop of transformers and peft on the same batch; forward_backward and
optim_step through Tink, against that loop and against the ceiling of a large matrix product; the same work
spread over eight tenants; vLLM straight and through Tink; a few steps of reinforcement learning; and a
`kill -9` of the training server in the middle of a run, with what was redone compared to the bit.

Prints a table, and writes it with all figures and logs into a folder. Without a GPU `--shapes tiny` tries
out the script itself: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}

import tinker
import torch
import trio
from tinker import types

from tests.bench import sampling
from tools.gpu import servers
from tools.gpu.shapes import SHAPES, Shape
from tools.rl_demo import datum

STEPS, TENANTS, RL_STEPS, REDONE = 12, 8, 4, 6
GROUPS, GROUP, NEW_TOKENS = 16, 8, 64

Figures = dict[str, float]


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tools/gpu/measure",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", default="0.6B,8B", help=f"of {', '.join(SHAPES)} (default: %(default)s)"
    )
    parser.add_argument("--vllm", default="vllm", help="the vllm program (default: the one on the PATH)")
    parser.add_argument("--models", type=Path, default=Path("/tmp/tink-models"), help="random models, kept")
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="default: %(default)s")
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    about = environment()
    (options.out / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    ceiling = plain("ceiling")["flops"]
    say(f"ceiling {ceiling / 1e12:.0f} TFLOP/s")
    for name in options.shapes.split(","):
        found: Figures = {"ceiling_tflops": ceiling / 1e12}
        try:
            for key, value in measure(SHAPES[name], options, ceiling):
                found[key] = value
                say(f"{name} {key} {value:.4g}")
        finally:
            (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(options.out))
    return 0


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f}] {text}", file=sys.stderr, flush=True)


BEGAN = time.monotonic()


def environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for name in ("torch", "transformers", "peft", "megatron-core", "vllm", "tinker", "trio"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not in this Python"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def plain(*words: str) -> dict[str, Any]:
    """What plain.py says, in a process of its own."""
    command = [sys.executable, "-m", "tools.gpu.plain", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- one shape --------------------------------------------------------------------------------------


def measure(shape: Shape, options: argparse.Namespace, ceiling: float) -> Iterator[tuple[str, float]]:
    out = options.out / shape.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    arguments = (shape.name, str(options.models))
    model = Path(plain("model", *arguments)["directory"])
    loop = plain("peft", *arguments)
    yield "peft_tokens_per_second", loop["tokens_per_second"]
    yield "peft_mfu", loop["tokens_per_second"] / shape.tokens * shape.flops / ceiling
    yield "peft_memory_gib", loop["memory_gib"]

    vllm = servers.vllm(shape, model, out, options.vllm, torch.cuda.is_available())
    trainer = servers.trainer(shape, model, out)
    worker = servers.worker(shape, trainer, vllm, out)
    try:
        vllm.start()
        yield "vllm_start_seconds", vllm.wait()
        # After vLLM, which looks at the memory that is free when it starts.
        trainer.start()
        yield "trainer_start_seconds", trainer.wait()
        yield "trainer_memory_gib", used_memory() or 0.0
        worker.start()
        worker.wait()
        yield from through_tink(shape, Tink(shape, worker, trainer, vllm, out), ceiling)
    finally:
        for server in (worker, trainer, vllm):
            server.stop()


def used_memory() -> float | None:
    """GiB, of all that runs on the GPU."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) / 1024


class Tink:
    """The worker as the SDK sees it, and its journal."""

    def __init__(self, shape: Shape, worker: Any, trainer: Any, vllm: Any, out: Path) -> None:
        self.shape, self.worker, self.trainer, self.vllm, self.out = shape, worker, trainer, vllm, out
        self._service = tinker.ServiceClient(base_url=worker.url, api_key="tml-local")

    def model(self, seed: int) -> tinker.TrainingClient:
        return self._service.create_lora_training_client(
            self.shape.name, rank=self.shape.rank, seed=seed, train_unembed=False
        ).result()

    def asked(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        journal = f"file:{self.out / 'home' / 'journal.sqlite'}?mode=ro"
        with closing(sqlite3.connect(journal, uri=True)) as connection:
            return connection.execute(sql, values).fetchall()


def through_tink(shape: Shape, tink: Tink, ceiling: float) -> Iterator[tuple[str, float]]:
    one = tink.model(1)
    steps(shape, [one], 2)
    began = time.monotonic()
    losses = steps(shape, [one], STEPS)
    seconds = (time.monotonic() - began) / STEPS
    yield "tokens_per_second", shape.tokens / seconds
    yield "mfu", shape.flops / seconds / ceiling
    yield "loss_first", losses[0]
    yield "loss_last", losses[-1]
    yield from lane(tink, one.model_id)
    yield "gpu_memory_gib", used_memory() or 0.0

    tenants = [tink.model(seed) for seed in range(2, 2 + TENANTS)]
    steps(shape, tenants, TENANTS)
    began = time.monotonic()
    steps(shape, tenants, 2 * TENANTS)
    several = (time.monotonic() - began) / (2 * TENANTS)
    yield "swap_milliseconds", (several - seconds) * 1000

    path = one.save_weights_for_sampler("bench").result().path
    served = sampling.served_name([tink.vllm.url], f"/{one.model_id}@1-")
    weights = [sampling.Weights(served, path)]
    requests = 256 if torch.cuda.is_available() else 16
    asked = argparse.Namespace(at_once=64, requests=requests, samples=1, tokens=128, prompt=128)
    trio.run(sampling.straight, [tink.vllm.url], weights, asked)
    straight = trio.run(sampling.straight, [tink.vllm.url], weights, asked)
    through = trio.run(sampling.through, tink.worker.url, weights, asked)
    yield "vllm_tokens_per_second", straight.speed
    yield "sampled_tokens_per_second", through.speed
    yield from reinforce(shape, tink)
    yield from recover(shape, tink)


def steps(shape: Shape, models: list[tinker.TrainingClient], count: int, first: int = 0) -> list[float]:
    """So many, in turn, all sent before one is awaited. The losses per token."""
    updates, optims = [], []
    for number in range(first, first + count):
        model = models[number % len(models)]
        updates.append(model.forward_backward(batch(shape, number % 3), "cross_entropy"))
        optims.append(model.optim_step(types.AdamParams(learning_rate=1e-4)))
    for optim in optims:
        optim.result()
    return [update.result().metrics["loss:sum"] / shape.tokens for update in updates]


def batch(shape: Shape, seed: int) -> list[types.Datum]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, shape.vocab, (shape.rows, shape.length + 1), generator=draw).tolist()
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * shape.length},
        )
        for row in tokens
    ]


def lane(tink: Tink, model_id: str) -> Iterator[tuple[str, float]]:
    """What the journal says of the lane: how long it computed, and how long it stood still in between."""
    sql = "SELECT op, run_ms, idle_ms FROM jobs WHERE model_id = ? AND state = 'done' ORDER BY op_no"
    jobs = [job for job in tink.asked(sql, model_id) if job[0] in ("forward_backward", "optim_step")][4:]
    for op in ("forward_backward", "optim_step"):
        yield f"{op}_ms", statistics.median(run for kind, run, _ in jobs if kind == op)
    yield "idle_ms", statistics.median(idle for _, _, idle in jobs)


def reinforce(shape: Shape, tink: Tink) -> Iterator[tuple[str, float]]:
    """A few steps: even tokens are rewarded. The sampler's log-probabilities against the trainer's."""
    model = tink.model(100)
    rewards, differences = [], []
    began = time.monotonic()
    for step in range(RL_STEPS):
        sampler = model.save_weights_and_get_sampling_client().result()
        prompts = [[(17 * group + place) % 1000 + 10 for place in range(32)] for group in range(GROUPS)]
        params = [
            types.SamplingParams(max_tokens=NEW_TOKENS, seed=1000 * step + group, stop=[])
            for group in range(GROUPS)
        ]
        futures = [
            sampler.sample(types.ModelInput.from_ints(prompt), num_samples=GROUP, sampling_params=one)
            for prompt, one in zip(prompts, params, strict=True)
        ]
        rollouts = [
            (prompt, one.tokens, one.logprobs)
            for prompt, future in zip(prompts, futures, strict=True)
            for one in future.result().sequences
        ]
        values = [statistics.fmean(token % 2 == 0 for token in tokens) for _, tokens, _ in rollouts]
        mean = statistics.fmean(values)
        rewards.append(mean)
        data = [datum(*rollout, value - mean) for rollout, value in zip(rollouts, values, strict=True)]
        update = model.forward_backward(data, "importance_sampling")
        optim = model.optim_step(types.AdamParams(learning_rate=1e-3))
        outputs = update.result().loss_fn_outputs
        optim.result()
        for (prompt, _, theirs), output in zip(rollouts, outputs, strict=True):
            ours = output["logprobs"].data[len(prompt) - 1 :]
            differences += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    yield "rl_seconds_per_step", (time.monotonic() - began) / RL_STEPS
    yield "rl_reward_first", rewards[0]
    yield "rl_reward_last", rewards[-1]
    yield "logprob_difference_mean", statistics.fmean(differences)
    yield "logprob_difference_max", max(differences)


def recover(shape: Shape, tink: Tink) -> Iterator[tuple[str, float]]:
    """kill -9 of the training server in the middle of a run, which is compared with an undisturbed one."""
    undisturbed = steps(shape, [tink.model(200)], 2 * REDONE)
    model = tink.model(200)
    losses = steps(shape, [model], REDONE)
    tink.trainer.kill()
    tink.trainer.start()
    began = time.monotonic()
    losses += steps(shape, [model], 1, first=REDONE)
    yield "recovery_seconds", time.monotonic() - began
    losses += steps(shape, [model], REDONE - 1, first=REDONE + 1)
    yield "redo_max_difference", max(abs(a - b) for a, b in zip(losses, undisturbed, strict=True))
    ((diverged,),) = tink.asked("SELECT count(*) FROM events WHERE kind = 'diverged'")
    yield "redo_diverged_jobs", diverged


ROWS = {
    "tokens_per_second": ("trained tokens a second, through the SDK", "{:,.0f}"),
    "mfu": ("share of the ceiling (4 FLOP a weight and token)", "{:.3f}"),
    "peft_tokens_per_second": ("the plain peft loop", "{:,.0f}"),
    "peft_mfu": ("its share of the ceiling", "{:.3f}"),
    "forward_backward_ms": ("forward_backward, ms", "{:.0f}"),
    "optim_step_ms": ("optim_step, ms", "{:.1f}"),
    "idle_ms": ("the trainer idle between two jobs, ms", "{:.1f}"),
    "swap_milliseconds": (f"a step of {TENANTS} tenants in turn against one, ms more", "{:.1f}"),
    "gpu_memory_gib": ("memory of the GPU with vLLM, GiB", "{:.0f}"),
    "peft_memory_gib": ("the peft loop's memory, GiB", "{:.0f}"),
    "vllm_tokens_per_second": ("vLLM straight, tokens a second", "{:,.0f}"),
    "sampled_tokens_per_second": ("vLLM through Tink, tokens a second", "{:,.0f}"),
    "rl_seconds_per_step": ("a step of RL, s", "{:.2f}"),
    "logprob_difference_mean": ("log-probabilities, trainer against vLLM, mean", "{:.4f}"),
    "recovery_seconds": ("kill -9 of the trainer until the next result, s", "{:.1f}"),
    "redo_max_difference": ("losses after it, against undisturbed", "{:g}"),
    "redo_diverged_jobs": ("redone jobs that differ", "{:.0f}"),
    "trainer_start_seconds": ("start of the trainer, s", "{:.0f}"),
    "vllm_start_seconds": ("start of vLLM, s", "{:.0f}"),
}


def table(out: Path) -> str:
    """Of all shapes that were ever measured into the folder, in Markdown; written there too."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    about = found.pop("environment")
    lines = [
        f"{about['device']}, " + ", ".join(f"{k} {v}" for k, v in about.items() if k != "device"),
        "",
        "| | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for key, (title, form) in ROWS.items():
        cells = [form.format(figures[key]) if key in figures else "" for figures in found.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    (out / "table.md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
