"""What Tink is compared with: `plain.py ceiling`, a large matrix product, and `plain.py peft SHAPE FOLDER`,
a loop of transformers and peft as its documentation has it. Also `plain.py model SHAPE FOLDER`, which makes
the model. Each is a process of its own, so that the GPU's memory is free behind it. One line of JSON on
stdout.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.gpu.shapes import SHAPES, Shape, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(work: Any, warm: int, rounds: int) -> float:
    """Median seconds."""
    found = []
    for number in range(warm + rounds):
        wait()
        began = time.perf_counter()
        work()
        wait()
        if number >= warm:
            found.append(time.perf_counter() - began)
    return median(found)


def ceiling() -> dict[str, float]:
    """FLOP/s of an 8192 x 8192 x 8192 product in bfloat16, on random data."""
    size = 8192 if DEVICE == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    return {"flops": 2 * size**3 / timed(lambda: a @ b, 3, 20)}


def peft(shape: Shape, directory: Path) -> dict[str, float]:
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, shape.dtype))
    model = get_peft_model(
        model.to(DEVICE), LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=TARGETS)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE == "cuda")
    ids = torch.randint(1, shape.vocab, (shape.rows, shape.length), device=DEVICE)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, 3, 10)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"tokens_per_second": shape.tokens / seconds, "memory_gib": memory, "resident_mb": resident}


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "ceiling":
        found: dict[str, Any] = ceiling()
    else:
        shape, folder = SHAPES[rest[0]], Path(rest[1])
        directory = make(shape, folder)
        found = peft(shape, directory) if what == "peft" else {"directory": str(directory)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
