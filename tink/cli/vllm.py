"""`tink vllm`: a vLLM server, started as Tink needs it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tink import pretrained
from tink.errors import StartupError
from tink.limits import CPU_LORAS_PER_PLACE, MAX_STOPS, MAX_TOPK, REPLICA_DRAIN_SECONDS
from tink.logs import write_line
from tink.settings import Settings

HELP = "start a vLLM server for USE_VLLM"
DESCRIPTION = """\
Starts 'vllm serve' with what Tink needs of it: adapters at run time, the
model's own log-probabilities, a shutdown that lets requests end. The worker
finds it at VLLM_BASE_URL, or at VLLM_HOST and VLLM_PORT. It replaces this
process: signals and exit status are vLLM's."""
EPILOG = """\
environment: VLLM_HOST, VLLM_PORT, VLLM_GROUP_PORT, VLLM_GPU_MEMORY_UTIL,
VLLM_ENABLE_LORA, VLLM_MAX_LORAS, VLLM_MAX_LORA_RANK, and TINK_HF_MODEL for the
model. Whatever else vLLM can do goes behind --options.

examples:
  tink vllm                                     the built-in model, port 8000
  tink vllm Qwen/Qwen3-8B --port 8001           another model, another port
  tink vllm --vllm /opt/vllm/bin/vllm --options --max-model-len 8192 --dtype float32
  tink vllm --print                             the command, and nothing else

exit status: 0 after a stop; 2 if it cannot be started; else vLLM's own"""

# Ours, and not vLLM's. It has a VLLM_PORT of its own, which is our VLLM_GROUP_PORT.
OURS = frozenset(
    [
        "VLLM_BASE_URL",
        "VLLM_HOST",
        "VLLM_PORT",
        "VLLM_GROUP_PORT",
        "VLLM_GPU_MEMORY_UTIL",
        "VLLM_ENABLE_LORA",
        "VLLM_MAX_LORAS",
        "VLLM_MAX_LORA_RANK",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument(
        "model", nargs="?", help="directory or hub id (TINK_HF_MODEL; default the built-in model)"
    )
    parser.add_argument("--name", help="what clients call it (TINK_HF_MODEL_NAME; default the model)")
    parser.add_argument("--host", help="address to listen on (VLLM_HOST; default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (VLLM_PORT; default 8000)")
    parser.add_argument(
        "--home", type=Path, help="where the built-in model is (TINK_HOME; default ~/.tink)"
    )
    parser.add_argument("--vllm", default="vllm", help="the vllm program (default: the one on the PATH)")
    parser.add_argument("--print", action="store_true", help="print the command and start nothing")
    parser.add_argument(
        "--options",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="at the end: what follows are options of vllm serve",
    )


def run(arguments: argparse.Namespace) -> int:
    settings = Settings.load(
        os.environ,
        home=arguments.home,
        vllm_host=arguments.host,
        vllm_port=arguments.port,
        hf_model=arguments.model,
        hf_model_name=arguments.name,
    )
    words = [arguments.vllm, *command(settings), *arguments.options]
    added = environment(settings, {})
    if arguments.print:
        print(shlex.join([*(f"{name}={value}" for name, value in added.items()), *words]))
        return 0
    program = shutil.which(arguments.vllm)
    if program is None:
        raise StartupError(
            f"there is no program {arguments.vllm!r}: install vLLM (tools/vllm-venv does, for the CPU), "
            "and pass it with --vllm"
        )
    write_line(shlex.join(words), sys.stderr)
    os.execve(program, words, environment(settings, os.environ))  # noqa: S606  no shell
    return 2  # never: vLLM has replaced this process


def command(settings: Settings) -> list[str]:
    """The words behind `vllm`."""
    name = settings.hf_model_name or settings.hf_model or pretrained.BUILT_IN
    words = ["serve", settings.hf_model or str(_built_in(settings.home)), "--served-model-name", name]
    words += ["--host", settings.vllm_host, "--port", str(settings.vllm_port)]
    words += ["--gpu-memory-utilization", str(settings.vllm_gpu_memory_util)]
    if settings.vllm_enable_lora:
        loras, rank = str(settings.vllm_max_loras), str(settings.vllm_max_lora_rank)
        kept = str(CPU_LORAS_PER_PLACE * settings.vllm_max_loras)
        words += ["--enable-lora", "--max-loras", loras, "--max-lora-rank", rank, "--max-cpu-loras", kept]
    words += ["--max-logprobs", str(MAX_TOPK), "--logprobs-mode", "raw_logprobs"]
    return [*words, "--shutdown-timeout", f"{REPLICA_DRAIN_SECONDS:.0f}"]


def environment(settings: Settings, before: Mapping[str, str]) -> dict[str, str]:
    """What vLLM is started with, in the place of `before`."""
    found = {name: value for name, value in before.items() if name not in OURS}
    found |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_MAX_STOP_STRINGS": str(MAX_STOPS)}
    if settings.vllm_group_port is not None:
        found["VLLM_PORT"] = str(settings.vllm_group_port)
    return found


def _built_in(home: Path) -> Path:
    directory = pretrained.built_in(home)
    if directory.is_dir():
        return directory
    if find_spec("torch") is None:
        raise StartupError(
            f"the built-in model is not in {home}: 'tink serve' builds it at its start; or name another"
        )
    from tink.trainer import tiny  # imports torch

    return tiny.ensure(home)
