"""Survives the death of the client: kill -9 in the middle of a run, then on from the last checkpoint.

    tink serve                           # in one terminal
    python tools/examples/resume.py      # in another

One run is left alone. The other is a child process that saves its state every few steps, and is killed.
A new client takes up the last checkpoint, weights and optimizer. The losses must be the same to the
last bit.
"""

import os
import random
import subprocess
import sys

import tinker
from tinker import types

os.environ.setdefault("TINKER_BASE_URL", "http://127.0.0.1:8400")
os.environ.setdefault("TINKER_API_KEY", "tml-local")

STEPS = 12
SAVE_EVERY = 4
KILL_AT = 6
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "

service = tinker.ServiceClient()


def create() -> tinker.TrainingClient:
    base_model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    # The seed makes the first weights of both runs the same.
    return service.create_lora_training_client(base_model=base_model, rank=8, seed=7).result()


def batch(ids: list[int], step: int) -> list[types.Datum]:
    """A function of the step alone: whoever resumes at step n draws what would have been drawn there."""
    draw = random.Random(step)
    starts = [draw.randrange(len(ids) - 17) for _ in range(4)]
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(ids[start : start + 16]),
            loss_fn_inputs={"target_tokens": ids[start + 1 : start + 17], "weights": [1.0] * 16},
        )
        for start in starts
    ]


def train(client: tinker.TrainingClient, first: int, save: bool = False) -> dict[int, float]:
    """Steps `first` to the end; what happens is printed as it happens."""
    ids = client.get_tokenizer().encode(TEXT * 3)
    losses = {}
    for step in range(first, STEPS):
        if save and step and step % SAVE_EVERY == 0:
            path = client.save_state(f"step-{step}").result().path
            print("saved", step, path, flush=True)
        update = client.forward_backward(batch(ids, step), "cross_entropy")
        optim = client.optim_step(types.AdamParams(learning_rate=2e-3))
        losses[step] = update.result().metrics["loss:sum"]
        optim.result()
        print("loss", step, repr(losses[step]), flush=True)
    return losses


def train_and_die() -> tuple[int, str]:
    """The last checkpoint of a client that is killed with SIGKILL: its step and its path."""
    checkpoint = (0, "")
    child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        kind, step, value = line.split()
        print("  child:", line, end="")
        if kind == "saved":
            checkpoint = (int(step), value)
        elif int(step) == KILL_AT:
            child.kill()
            break
    child.wait()
    return checkpoint


if sys.argv[1:] == ["child"]:
    train(create(), 0, save=True)
    sys.exit()

print("undisturbed:")
undisturbed = train(create(), 0)
print(f"a child, killed after step {KILL_AT}:")
first, path = train_and_die()
print(f"resumed from {path}:")
resumed = train(service.create_training_client_from_state_with_optimizer(path).result(), first)

print("step  undisturbed         resumed")
for step, loss in resumed.items():
    print(
        f"{step:4}  {undisturbed[step]!r:18}  {loss!r:18}  {'same' if loss == undisturbed[step] else 'NOT'}"
    )
same = sum(loss == undisturbed[step] for step, loss in resumed.items())
print(f"resume: {same} of {STEPS - first} losses the same, bit for bit, after kill -9 at step {KILL_AT}")
sys.exit(same != STEPS - first)
