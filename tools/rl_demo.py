"""Reinforcement learning through the unmodified `tinker` SDK against a `tink serve` of its own.

A tiny model that has read the Python standard library's docstrings learns to alliterate: a sample is
rewarded for the real words in it that begin with "s". The loop is the textbook one. Each step takes a
sampler with the present weights, draws a group of samples for each prompt, computes rewards here in
Python, and makes one importance-sampling update with advantages relative to the group.

With --megatron the weights are a training server's of two processes (megatron-core, each with half of every
layer), one of which is killed half way. With --vllm the samples come from two vLLM servers on the CPU, one
of which is killed half way, too.

The first run also trains that model, which takes a minute or two; it is kept. The home folder keeps the
journal of all runs (journal.sqlite), the server's log and the plots.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The model and its tokenizer are made here: there is nothing to look up, and nobody to tell.
os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
# torch's threads spin while they wait for each other, which on a busy machine takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tinker import types

from tools import megatron_trainer, vllm_pool
from tools.megatron_trainer import MegatronTrainer

ROOT = Path(__file__).resolve().parent.parent
MODEL_NAME = "tink/qwen3-tiny-docstrings"
MODEL_STEPS = 300
LETTER = "s"
PROMPTS = (
    "Return the",
    "This module provides",
    "If the file is",
    "Raise an error when",
    "The first argument",
    "Called when the",
    "Convert a",
    "A list of",
)
START_SECONDS = 120.0
STOP_SECONDS = 60.0

console = Console(highlight=False)


@dataclass(frozen=True)
class Recipe:
    """What works on this model. With a group of 8 or half the learning rate it takes twice the steps."""

    steps: int
    seed: int
    group: int = 16
    max_tokens: int = 16
    rank: int = 32
    learning_rate: float = 6e-3

    def rate(self, step: int) -> float:
        """From half way on down to zero: at full rate the last steps would undo what was learnt."""
        return self.learning_rate * min(2 * (1 - step / self.steps), 1.0)


@dataclass
class Run:
    """What there is to tell in the end. `rewards` and `losses` are of each step; `first` and `last` are
    the rewards of the same draws before the first update and after the last one."""

    rewards: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    session_id: str = ""
    jobs: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


# -- the task ---------------------------------------------------------------------------------------


def reward(text: str, vocabulary: frozenset[str]) -> float:
    """The share of words that are rewarded. Of six words at least: else one good word would be best."""
    return len(find_good(text, vocabulary)) / max(len(text.split()), 6)


def find_good(text: str, vocabulary: frozenset[str]) -> list[re.Match[str]]:
    """Words that begin with the letter, are words of the docstrings, and come for the first time."""
    good = {}
    for match in re.finditer(r"\S+", text):
        word = match[0].lower().strip(".,:;()'\"`")
        if word.startswith(LETTER) and word in vocabulary:
            good.setdefault(word, match)
    return list(good.values())


def read_vocabulary() -> frozenset[str]:
    from tink.trainer.corpus import docstrings

    words = {word for doc in docstrings() for word in re.findall(r"[a-z]+", doc.text.lower())}
    return frozenset(word for word in words if len(word) > 1)


# -- the loop ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """The samples of one step: `texts[i]` is one of prompt i's, `data` is what to learn from all."""

    data: list[types.Datum]
    texts: list[str]
    reward: float
    tokens: int


def learn(url: str, recipe: Recipe, run: Run, show: Callable[[Run], None]) -> None:
    """Fills `run`, and calls `show` after each step."""
    account = {"base_url": url, "api_key": "tml-local"}
    server = tinker.RestClient(**account).get_server_capabilities().result()
    client = (
        tinker.ServiceClient(**account)
        .create_lora_training_client(
            base_model=server.supported_models[0].model_name, rank=recipe.rank, seed=recipe.seed
        )
        .result()
    )
    run.session_id = client.model_id.partition(":")[0]
    tokenizer = client.get_tokenizer()
    vocabulary = read_vocabulary()
    started = time.monotonic()

    def roll_out(step: int) -> Rollout:
        sampler = client.save_weights_and_get_sampling_client().result()
        rollout = draw(sampler, tokenizer, vocabulary, recipe, step)
        run.tokens += rollout.tokens
        return rollout

    for step in range(recipe.steps):
        rollout = roll_out(step)
        # Both are sent before the first one is awaited, so that the server need not wait in between.
        update = client.forward_backward(rollout.data, "importance_sampling")
        optim = client.optim_step(types.AdamParams(learning_rate=recipe.rate(step)))
        run.losses.append(update.result().metrics["loss:sum"])
        optim.result()
        run.rewards.append(rollout.reward)
        if step == 0:
            run.first, run.before = rollout.reward, rollout.texts
        run.seconds = time.monotonic() - started
        show(run)
    rollout = roll_out(0)
    run.last, run.after = rollout.reward, rollout.texts
    run.seconds = time.monotonic() - started


def draw(
    sampler: tinker.SamplingClient, tokenizer: Any, vocabulary: frozenset[str], recipe: Recipe, step: int
) -> Rollout:
    """A group of samples for each prompt, all asked for at once. The seeds are functions of the step, so
    a demo with the same --seed is the same demo."""
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    first_seed = recipe.seed * 1_000_003 + step * len(prompts)
    asked = [
        sampler.sample(
            types.ModelInput.from_ints(prompt),
            num_samples=recipe.group,
            sampling_params=types.SamplingParams(
                # The end of a document is an end too, beside the end of a turn.
                max_tokens=recipe.max_tokens,
                stop=[tokenizer.pad_token_id],
                seed=first_seed + index,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    groups = [future.result().sequences for future in asked]
    texts = [[tokenizer.decode(one.tokens, skip_special_tokens=True) for one in group] for group in groups]
    rewards = [[reward(text, vocabulary) for text in group] for group in texts]
    tokens = sum(len(one.tokens) for group in groups for one in group)
    data = [
        # Better or worse than the rest of its group; per token, since the loss is a sum.
        datum(prompt, one.tokens, one.logprobs, (value - statistics.fmean(values)) / tokens)
        for prompt, group, values in zip(prompts, groups, rewards, strict=True)
        for one, value in zip(group, values, strict=True)
    ]
    mean = statistics.fmean(value for values in rewards for value in values)
    return Rollout(data, [group[0] for group in texts], mean, tokens)


def datum(prompt: list[int], tokens: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    """Position i predicts token i + 1. The prompt's own tokens have no advantage, hence no gradient."""
    given = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + tokens,
            "logprobs": [0.0] * given + logprobs,
            "advantages": [0.0] * given + [advantage] * len(tokens),
        },
    )


# -- the server -------------------------------------------------------------------------------------


def make_model(home: Path) -> Path:
    """The base model, trained on the docstrings unless it is there."""
    directory = home / "base-model"
    if directory.is_dir():
        return directory
    with progress("training the base model (once)", "loss {task.fields[loss]:.2f}", loss=0.0) as update:
        # It imports torch, which takes a while.
        from tink.trainer import tiny

        tiny.pretrain(
            directory, MODEL_STEPS, progress=lambda step, steps, loss: update(step, steps, loss=loss)
        )
    return directory


def settings(model: Path, vllm: list[vllm_pool.Server], trainer: MegatronTrainer | None) -> dict[str, str]:
    """The environment of `tink serve`."""
    if trainer is not None:
        found = trainer.settings
    else:
        found = {"USE_HF": "true", "TINK_HF_MODEL": str(model), "TINK_HF_MODEL_NAME": MODEL_NAME}
        # Should this process be killed and the server after it, its trainer will not stay for long.
        found["TINK_TRAINER_ORPHAN_SECONDS"] = "60"
    if vllm:
        found |= {"USE_VLLM": "true", "VLLM_BASE_URL": ",".join(server.url for server in vllm)}
    return found


@contextmanager
def serving(home: Path, settings: dict[str, str]) -> Iterator[str]:
    """`tink serve` on a free port; gives its address. In a session of its own, so that Ctrl-C reaches
    only the demo, and the server is always stopped in good order."""
    others = ("TINK_", "USE_", "VLLM_", "MEGATRON_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(others)} | settings
    log = home / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "tink.cli.main", "serve", "--home", str(home), "--port", "0"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    stopping = threading.Event()

    def watch() -> None:
        # The SDK would wait for a server that is gone, since servers come back: this one does not.
        server.wait()
        if not stopping.is_set():
            print(f"demo: tink serve ended by itself, see {log}", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        url = await_address(home, server, log)
        threading.Thread(target=watch, daemon=True).start()
        yield url
    finally:
        stopping.set()
        # Not to be interrupted: whoever presses Ctrl-C twice wants nothing left behind either.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def disturb(vllm: list[vllm_pool.Server], trainer: MegatronTrainer | None) -> None:
    """Kills one of each, a moment later: then samples are on their way."""
    if vllm:
        # Its samples move to the other one.
        console.print(f"  kill -9 {vllm[0].url}, and a new one there")
        threading.Timer(0.2, vllm[0].kill).start()
        threading.Timer(2.0, vllm[0].start).start()
    if trainer is not None:
        # Not the one that serves: it must notice.
        console.print(f"  kill -9 {trainer.rank(1)}, one of the two that train: torchrun starts both again")
        threading.Timer(0.2, trainer.kill_rank, [1]).start()


def await_address(home: Path, server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            record = json.loads((home / "worker.json").read_text())
        except (OSError, ValueError):
            record = {}
        if record.get("pid") == server.pid:
            return str(record["url"])
        time.sleep(0.05)
    raise SystemExit(f"demo: tink serve did not start:\n{log.read_text(errors='replace')}")


def count_jobs(home: Path, run: Run) -> None:
    """What the journal says of this run."""
    journal = f"file:{home / 'journal.sqlite'}?mode=ro"
    with closing(sqlite3.connect(journal, uri=True)) as connection:
        rows = connection.execute(
            "SELECT op, count(*), sum(state <> 'done') FROM jobs WHERE session_id = ? GROUP BY op",
            [run.session_id],
        ).fetchall()
    run.jobs = {op: count for op, count, _ in rows}
    run.unfinished = sum(unfinished for _, _, unfinished in rows)


class ClientErrors(logging.Handler):
    """Counts what the SDK reports as an error; `count` also takes those that reached the loop."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0
        logging.getLogger("tinker").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        console.print(f"client error: {record.getMessage()}", style="red", markup=False)


# -- what is shown ----------------------------------------------------------------------------------


@contextmanager
def progress(title: str, figures: str, **fields: float) -> Iterator[Callable[..., None]]:
    """A bar in a terminal, and ten lines elsewhere. Gives update(step, steps, **fields)."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(figures),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=None, **fields)
            yield lambda step, steps, **new: bar.update(task, completed=step, total=steps, **new)
        return

    def line(step: int, steps: int, **new: float) -> None:
        if step * 10 // steps != (step - 1) * 10 // steps or step == 1:
            shown = figures.replace("task.fields", "").replace("{[", "{0[").format(new)
            print(f"  {step}/{steps}  {shown}", flush=True)

    print(title, flush=True)
    yield line


def report(run: Run, recipe: Recipe, plot: Path) -> None:
    figures = Table(title="What happened", title_justify="left", show_header=False)
    figures.add_column(style="bold")
    figures.add_column()
    best = max([*run.rewards, run.last])
    figures.add_row("reward", f"{run.first:.3f} first, {run.last:.3f} last, {best:.3f} best")
    figures.add_row("loss per token", f"{run.losses[0]:+.4f} first, {run.losses[-1]:+.4f} last")
    samples = recipe.group * len(PROMPTS)
    figures.add_row("steps", f"{recipe.steps} of {samples} samples for {len(PROMPTS)} prompts")
    figures.add_row("tokens sampled", f"{run.tokens:,}, {run.speed:,.0f} a second with training between")
    kinds = ", ".join(f"{count} {op}" for op, count in sorted(run.jobs.items()))
    figures.add_row("jobs journaled", f"{kinds}; {run.unfinished or 'none'} unfinished")
    figures.add_row("time", f"{run.seconds:.0f} s")

    samples_table = Table(
        title=f'The same draw before and after: rewarded are real words with "{LETTER}"',
        title_justify="left",
        show_lines=True,
    )
    for column in ("prompt", "before", "after"):
        samples_table.add_column(column, ratio=1 if column == "prompt" else 3)
    vocabulary = read_vocabulary()
    for prompt, before, after in list(zip(PROMPTS, run.before, run.after, strict=True))[:4]:
        samples_table.add_row(prompt, marked(before, vocabulary), marked(after, vocabulary))
    console.print()
    console.print(samples_table)
    console.print()
    console.print(figures)
    console.print()
    print(f"plot: {plot}")


def marked(sample: str, vocabulary: frozenset[str]) -> Text:
    # Only printable characters: a byte-level model can say anything, to a terminal too.
    text = Text("".join(c if c.isprintable() else " " for c in " ".join(sample.split())))
    for match in find_good(text.plain, vocabulary):
        text.stylize("bold green", match.start(), match.end())
    return text


def draw_plot(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(len(run.rewards))
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    figure.suptitle(f'A tiny model learns to alliterate on "{LETTER}"', fontsize=15, weight="bold")
    for axes, values, label, colour in (
        (top, run.rewards, "mean reward of the samples", "#0b7a75"),
        (bottom, run.losses, "loss per token", "#b5541c"),
    ):
        axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1, marker=".", label="each step")
        axes.plot(steps, smoothed(values), color=colour, linewidth=2.4, label="smoothed")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    top.set_ylim(bottom=0)
    top.set_title(f"reward {run.first:.3f} before, {run.last:.3f} after", fontsize=11, loc="left")
    top.legend(frameon=False, loc="upper left")
    bottom.axhline(0, color="grey", linewidth=0.8)
    bottom.set_title(
        "importance sampling; advantages are centred, so it stays near 0", fontsize=11, loc="left"
    )
    bottom.set_xlabel("step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def smoothed(values: list[float], width: int = 5) -> list[float]:
    """A mean over a window around each point, smaller at the ends."""
    half = width // 2
    return [statistics.fmean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


# -- the whole --------------------------------------------------------------------------------------


def main() -> int:
    options = parse()
    # The server's paths are absolute, since it runs in the checkout.
    home = options.home.expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    (home / ".gitignore").write_text("*\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Ctrl-C may come while the SDK has made a coroutine and not yet handed it to its loop.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    # Two processes on the cores of one take twice as long.
    fast = 8 if options.megatron else 15
    recipe = Recipe(options.steps or (fast if options.fast else 40), options.seed)
    errors, run, plot = ClientErrors(), Run(), home / "reward.png"
    try:
        model = make_model(home)
        pool = vllm_pool.running(home, model, MODEL_NAME) if options.vllm else nullcontext([])
        training = megatron_trainer.running(home, model, MODEL_NAME) if options.megatron else nullcontext()
        with pool as vllm, training as trainer, serving(home, settings(model, vllm, trainer)) as url:
            print(f"tink serve is at {url}, its log is {home / 'serve.log'}", flush=True)
            figures = (
                "reward {task.fields[reward]:.3f}  loss {task.fields[loss]:+.4f}"
                "  {task.fields[speed]:.0f} tokens/s"
            )
            with progress("learning", figures, reward=0.0, loss=0.0, speed=0.0) as update:

                def show(run: Run) -> None:
                    step = len(run.rewards)
                    update(
                        step,
                        recipe.steps,
                        reward=run.rewards[-1],
                        loss=run.losses[-1],
                        speed=run.speed,
                    )
                    if step == recipe.steps // 2:
                        disturb(vllm, trainer)

                learn(url, recipe, run, show)
            count_jobs(home, run)
    except tinker.TinkerError as error:
        errors.count += 1
        print(f"demo: {type(error).__name__}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted, and everything stopped", file=sys.stderr)
        return 130
    if run.after:
        draw_plot(run, plot)
        report(run, recipe, plot)
    print(
        f"demo: reward {run.first:.3f} -> {run.last:.3f} in {len(run.rewards)} steps, "
        f"{sum(run.jobs.values())} jobs journaled, {errors.count} client errors"
    )
    return 0 if run.last > run.first and not errors.count else 1


def parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tools/demo",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # tools/demo looks for whole words.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="15 steps, with --megatron 8: one or two minutes once the model is there",
    )
    parser.add_argument(
        "--megatron",
        action="store_true",
        help="train on two processes with megatron-core, one of which is killed half way",
    )
    parser.add_argument(
        "--vllm",
        action="store_true",
        help="sample on two vLLM servers, one of which is killed half way and started again",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default 40)")
    parser.add_argument(
        "--home", type=Path, default=ROOT / ".demo", help="where everything is kept (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and of all samples (default 0)")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Native threads of the SDK's abort the interpreter's end now and then.
    os._exit(status)
