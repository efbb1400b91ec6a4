"""Records what a real vLLM says, for the double (tests/vllm/double.py) to say it too.

    python -m tests.vllm.record [--check]

writes tests/vllm/recording.json, from servers that it starts and ends as tests/vllm/conftest.py would.
--check compares instead, and exits with 1 if vLLM says something else now. What differs from run to run
(ids, times, folders) is replaced by words.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from tests.vllm.adapters import Adapters
from tests.vllm.fixtures import find_python
from tests.vllm.server import CONTEXT, RECORDING, VllmReplica
from tink.backends.completions import encode
from tink.trainer import tiny
from tink.wire.tink_train import SampleRequest

SERIES = re.compile(r"^vllm:(num_requests_|kv_cache_usage_perc|generation_tokens_total)")


class Recorder:
    """`words`: what is put in the place of what differs from run to run."""

    def __init__(self, folder: Path) -> None:
        self.words = {str(folder / "model"): "/model", str(folder / "adapters"): "/adapters"}
        self.exchanges: dict[str, Any] = {}
        self.url = ""

    def send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else None
        fields = body if content is None else None
        return httpx.request(
            method,
            self.url + path,
            content=content,
            json=fields,
            headers={"Content-Type": "application/json"} if content else {},
            timeout=60,
            trust_env=False,
        )

    def keep(self, name: str, answer: httpx.Response) -> None:
        text = answer.text
        for found, word in self.words.items():
            text = text.replace(found, word)
        text = re.sub(r'"created":\d+', '"created":0', text)
        text = re.sub(r"(cmpl|modelperm)-[0-9a-f]+", r"\1-0", text)
        if name == "metrics":
            text = "".join(f"{line}\n" for line in text.splitlines() if SERIES.match(line))
            text = re.sub(r"\S+$", "0.0", text, flags=re.MULTILINE)
        try:
            content = json.loads(text)
        except ValueError:
            content = text
        if name.startswith("completion") and answer.status_code == 200:
            _clear(content)
        self.exchanges[name] = {
            "status": answer.status_code,
            "type": answer.headers.get("content-type"),
            "body": content,
        }

    def record(self, name: str, method: str, path: str, body: Any = None) -> None:
        self.keep(name, self.send(method, path, body))


def sample(model: str = "base", **fields: Any) -> bytes:
    request = SampleRequest(**{"sample_id": "s", "prompt": [5, 6, 7], "seed": 0, "max_tokens": 2} | fields)
    return encode(request, model=model, max_context=100_000).body


def record(python: Path) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="tink-record-"))
    try:
        tiny.build(folder / "model")
        adapters = Adapters(folder / "model", folder / "adapters")
        for name, rank in (("a", 8), ("large", 128), ("broken", 8)):
            adapters.make(name, rank=rank)
        (folder / "adapters" / "broken" / "adapter_config.json").write_text("{")
        adapters.diverge("a", "diverged")
        recorder = Recorder(folder)
        server = VllmReplica(python, folder / "model", folder / "log")
        try:
            _record_all(recorder, folder, server)
        finally:
            server.close()
        return recorder.exchanges
    finally:
        shutil.rmtree(folder)


def _clear(completion: dict[str, Any]) -> None:
    """Of what the model said: it is another one on another machine, and how far it came is chance."""
    for choice in completion["choices"]:
        cleared = {"text": "", "stop_reason": None, "prompt_logprobs": None}
        cleared |= {"token_ids": [], "logprobs": {name: [] for name in choice["logprobs"]}}
        choice |= cleared
    completion["usage"] = dict.fromkeys(completion["usage"])
    completion["system_fingerprint"] = None


def _named(name: str, path: str | Path) -> dict[str, str]:
    return {"lora_name": name, "lora_path": str(path)}


def _record_all(recorder: Recorder, folder: Path, server: VllmReplica) -> None:
    load, unload, complete = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
    adapters = folder / "adapters"

    server.start()
    recorder.url = server.url
    recorder.record("health", "GET", "/health")
    recorder.record("version", "GET", "/version")
    recorder.record("metrics", "GET", "/metrics")
    recorder.record("unknown path", "GET", "/get_nothing")

    recorder.record("load", "POST", load, _named("a", adapters / "a"))
    recorder.record("load: again", "POST", load, _named("a", adapters / "a"))
    recorder.record("load: base", "POST", load, _named("base", adapters / "a"))
    recorder.record("load: missing", "POST", load, _named("b", adapters / "b"))
    recorder.record("load: rank", "POST", load, _named("b", adapters / "large"))
    recorder.record("load: broken", "POST", load, _named("b", adapters / "broken"))
    recorder.record("models", "GET", "/v1/models")

    top = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2}
    recorder.record("completion", "POST", complete, sample("a", temperature=0.0, **top))
    recorder.record("completion: no such model", "POST", complete, sample("b"))
    recorder.record("completion: sample logprobs", "POST", complete, sample(topk_sample_logprobs=21))
    recorder.record("completion: prompt logprobs", "POST", complete, sample(topk_prompt_logprobs=21))
    recorder.record("completion: stops", "POST", complete, sample(stop_strings=list("abcde")))
    recorder.record("completion: temperature", "POST", complete, sample(temperature=2.5))
    recorder.record("completion: vocabulary", "POST", complete, sample(prompt=[5000]))
    recorder.record("completion: stop token", "POST", complete, sample(stop_tokens=[5000]))
    recorder.record("completion: no prompt", "POST", complete, json.dumps({"prompt": []}).encode())
    recorder.record("completion: long prompt", "POST", complete, sample(prompt=[5] * (CONTEXT + 1)))

    recorder.record("unload", "POST", unload, {"lora_name": "a"})
    recorder.record("unload: again", "POST", unload, {"lora_name": "a"})

    long = sample(max_tokens=CONTEXT - 3, ignore_eos=True, temperature=0.0)
    with _meanwhile(recorder, complete, long) as answers:
        recorder.record("pause", "POST", "/pause")
    recorder.keep("completion: aborted", answers[0])
    recorder.record("resume", "POST", "/resume")

    batch = sample(max_tokens=CONTEXT - 3, num_samples=64, ignore_eos=True)
    with _meanwhile(recorder, complete, batch):
        server.terminate()
        # Each time by a new name: the first ones may come before the signal, and be loaded.
        names = (f"b{number}" for number in count())
        _until(lambda: recorder.send("POST", load, _named(next(names), adapters / "a")).status_code == 500)
        recorder.record("load: draining", "POST", load, _named(next(names), adapters / "a"))
        recorder.record("completion: draining", "POST", complete, sample())
        recorder.record("health: draining", "GET", "/health")
    assert server.process is not None
    server.process.wait(30)

    server.start()
    # In a life of its own: what it leaves in the KV cache can make the next ones fail too.
    recorder.send("POST", load, _named("diverged", adapters / "diverged")).raise_for_status()
    recorder.record("completion: diverged", "POST", complete, sample("diverged"))
    for number in range(10):
        name = str(number)
        shutil.copytree(adapters / "a", adapters / name)
        recorder.send("POST", load, _named(name, adapters / name)).raise_for_status()
    shutil.rmtree(adapters / "0")
    recorder.record("completion: files gone", "POST", complete, sample("0"))


@contextmanager
def _meanwhile(recorder: Recorder, path: str, body: bytes) -> Iterator[list[httpx.Response]]:
    """While a request runs; its answer is there afterwards."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(recorder.send("POST", path, body)))
    thread.start()
    _until(lambda: re.search(r"num_requests_running\{.*\} [1-9]", recorder.send("GET", "/metrics").text))
    yield answers
    thread.join()


def _until(found: Callable[[], object]) -> None:
    while not found():
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = json.dumps(record(find_python()), indent=1, ensure_ascii=False) + "\n"
    if not check:
        RECORDING.write_text(text)
    elif text != RECORDING.read_text():
        sys.stdout.writelines(
            difflib.unified_diff(RECORDING.read_text().splitlines(True), text.splitlines(True))
        )
        sys.exit(f"vLLM says something else than {RECORDING.name}")


if __name__ == "__main__":
    main()
