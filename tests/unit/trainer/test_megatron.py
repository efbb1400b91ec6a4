"""megatron-core against transformers: what it computes of the base model, and what comes of training on it,
in one process and in several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from ranks import lead, start
from safetensors.torch import load_file, save_file
from trainer_kit import SHAPE, body, datum, floats, ints, logprobs, sampled, state, supervised, train

from tink.errors import StartupError, UserError
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import huggingface
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.interface import Engine
from tink.trainer.engines.lora_engine import LoraEngine
from tink.trainer.engines.pipeline import Pipeline
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    Forward,
    ForwardBackward,
    LoadState,
    OptimStep,
    SampleRequest,
    SaveState,
)

megatron = pytest.importorskip("tink.trainer.engines.megatron", exc_type=ModuleNotFoundError)

# Can be divided among two, and among two times two; Qwen2's layers only unevenly.
SHAPES = asdict(replace(SHAPE, num_attention_heads=4, num_key_value_heads=2))
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "qwen3": lambda: transformers.Qwen3Config(**SHAPES, rope_parameters=ROPE),
    "qwen3-tied": lambda: transformers.Qwen3Config(
        **SHAPES | {"tie_word_embeddings": True}, rope_parameters=ROPE
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPES | {"num_hidden_layers": 3}, rope_parameters=ROPE),
    "llama": lambda: transformers.LlamaConfig(**SHAPES, rope_parameters=LLAMA3),
    "llama-linear": lambda: transformers.LlamaConfig(
        **SHAPES, rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}
    ),
}
# Processes, and stages among them.
MESHES = {"tensor": (2, 1), "pipeline": (2, 2), "both": (4, 2)}
IDS = torch.randint(0, 320, (3, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _process_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    """A model directory of each shape, with random weights (biases and norms too) and a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    transformers.utils.logging.disable_progress_bar()
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape) * (0.2 if weight.dim() == 2 else 0.5))
        # In several files, as large models come.
        model.save_pretrained(root / name, max_shard_size="60KB")
        for file in model_dir.glob("tokenizer*"):
            (root / name / file.name).write_bytes(file.read_bytes())
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, np.ndarray]:
    """The logits of transformers, (3, 33, 320)."""
    return {name: _logits(huggingface.load(path, name)) for name, path in models.items()}


def _logits(base: BaseModel) -> np.ndarray:
    with torch.inference_mode():
        return base.head.logits(base.hidden(IDS)).numpy()


def _cached(base: BaseModel) -> np.ndarray:
    """The same, one token after the other behind the first eight."""
    with torch.inference_mode():
        cache = base.new_cache()
        pieces = [IDS[:, :8], *IDS[:, 8:].split(1, dim=1)]
        return base.head.logits(torch.cat([base.hidden(piece, cache) for piece in pieces], 1)).numpy()


def _scored(base: BaseModel) -> np.ndarray:
    """log p of every token of the vocabulary at each place of the first row: (33, 320)."""
    with torch.inference_mode():
        return base.head.logprobs(base.hidden(IDS)[0], torch.arange(320).expand(33, -1)).numpy()


# -- the base model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(
    models: dict[str, Path], plain: dict[str, np.ndarray], name: str
) -> None:
    base = megatron.load(models[name], name)
    np.testing.assert_allclose(_logits(base), plain[name], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(_cached(base), plain[name], atol=2e-5, rtol=1e-5)
    expected = torch.tensor(plain[name][0]).log_softmax(-1).numpy()
    np.testing.assert_allclose(_scored(base), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_said_of_a_model_is_what_transformers_says(models: dict[str, Path], name: str) -> None:
    ours, theirs = megatron.load(models[name], name), huggingface.load(models[name], name)
    assert list(ours.sites.shapes.items()) == list(theirs.sites.shapes.items())
    for field in ("digest", "arch", "eos", "vocab_size", "context", "parameters"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("qwen3", {"model_type": "gemma"}, "model_type 'gemma'"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            "qwen3",
            {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            "sliding_window 8",
        ),
        ("qwen3", {"intermediate_size": 40}, "has shape"),
        ("llama", {"num_hidden_layers": 1}, "no place for model.layers.1"),
        ("llama", {"num_hidden_layers": 3}, "have no model.layers.2"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    models: dict[str, Path], tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    for file in models[name].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((models[name] / "config.json").read_text())
    changed = {key: value for key, value in {**config, **change}.items() if value is not None}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(StartupError, match=says):
        megatron.load(tmp_path, name)


def test_a_tensor_without_a_place_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """As a bias of a layer that has none here would be: the model would be another one without it."""
    for file in models["llama"].iterdir():
        if "safetensors" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    tensors = {k: v for file in models["llama"].glob("*.safetensors") for k, v in load_file(file).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    megatron.load(tmp_path, "old files have frequencies")
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.bias": torch.zeros(48)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(StartupError, match=r"no place for model.layers.1.mlp.up_proj.bias"):
        megatron.load(tmp_path, "new")


@pytest.mark.slow
def test_a_start_leaves_torchs_compiler_out() -> None:
    """Each process that torchrun starts after a kill would spend seconds on importing it."""
    program = "import sys, tink.trainer.engines.megatron; sys.exit('torch._inductor' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_at_the_end_of_a_process_its_group_is_gone() -> None:
    """With gloo's threads, which abort one exit in ten."""
    program = (
        "import atexit, torch.distributed as dist; from tink.trainer.engines import megatron; "
        # What is registered first runs last.
        "atexit.register(lambda: print(dist.is_initialized())); megatron.join()"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "ranks", "stages", "says"),
    [
        (None, 2, 1, "num_key_value_heads 1 cannot be divided among 2 processes"),
        (None, 4, 2, "num_key_value_heads 1 cannot be divided among 2 processes"),
        (None, 3, 3, "num_hidden_layers 2 are fewer than 3 stages"),
        ("qwen2", 3, 3, "vocab_size 320 cannot be divided among 3 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    model_dir: Path, models: dict[str, Path], name: str | None, ranks: int, stages: int, says: str
) -> None:
    with pytest.raises(StartupError, match=says):
        megatron.load(models[name] if name else model_dir, "test/tiny", ranks=ranks, stages=stages)


@pytest.mark.parametrize(("layers", "stages"), [(2, 2), (3, 2), (7, 3), (28, 8), (4, 1)])
def test_every_layer_is_in_one_stage_and_no_stage_has_two_more_than_another(
    layers: int, stages: int
) -> None:
    shares = [Pipeline(None, stage, stages).share(layers) for stage in range(stages)]
    assert [number for share in shares for number in share] == list(range(layers))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# -- training -------------------------------------------------------------------------------------

CREATES = {
    "all": CreateModel(rank=4, alpha=8.0, seed=7),
    "narrow": CreateModel(rank=2, alpha=4.0, seed=1, train_mlp=False, train_unembed=False),
    "mlp": CreateModel(rank=1, alpha=4.0, seed=2, train_attn=False),
    "head": CreateModel(rank=8, alpha=32.0, seed=3, train_attn=False, train_mlp=False),
}
STEP = OptimStep(learning_rate=0.003, eps=1e-4, weight_decay=0.1, grad_clip_norm=5.0)


def _policy(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    data = [
        datum(
            random.integers(0, 320, length).tolist(),
            target_tokens=random.integers(0, 320, length),
            logprobs=(random.normal(size=length) * 0.1 - 6).astype(np.float32),
            advantages=random.normal(size=length).astype(np.float32),
        )
        for length in (7, 30)
    ]
    return body(data, "ppo")


def _micro_batches(seed: int) -> bytes:
    """Data whose targets are of different shapes, which makes three micro-batches of them."""
    random = np.random.default_rng(seed)
    wide = datum(
        random.integers(0, 320, 21).tolist(),
        target_tokens=random.integers(0, 320, (21, 2)),
        weights=random.normal(size=(21, 2)).astype(np.float32),
    )
    return body([*supervised(seed + 1), wide, *supervised(seed + 2, (9,))])


def ten_steps(engine: Engine, artifacts: Artifacts, steps: int = 10) -> dict[str, Any]:
    """Each model trained for ten steps, in turn, with two kinds of loss: everything that came of it."""
    found: dict[str, Any] = {"losses": [], "logprobs": [], "norms": []}
    for model_id, create in CREATES.items():
        engine.create(model_id, create)
    for step in range(steps):
        for model_id in CREATES:
            for encoded in (body(supervised(step)), _policy(step), _micro_batches(step)):
                result = engine.forward_backward(model_id, ForwardBackward(encoded))
                found["losses"].append(result.loss)
                found["logprobs"] += logprobs(result.body)
            found["norms"].append(engine.optim_step(model_id, STEP)["grad_norm"])
    for model_id in CREATES:
        engine.export_adapter(model_id, ExportAdapter(f"exports/{model_id}"), model_id)
        found[model_id] = load_file(artifacts.root / "exports" / model_id / "adapter_model.safetensors")
        request = SampleRequest(
            *("s", [10, 20, 30, 40], 1),
            adapter=f"exports/{model_id}",
            max_tokens=12,
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
        )
        answer = sampled(engine.sample(request).body)
        found[f"tokens of {model_id}"] = ints(answer.sequences[0].tokens)
        found["logprobs"] += [floats(answer.sequences[0].logprobs), floats(answer.prompt_logprobs)[1:]]
    return found


@pytest.fixture(scope="module")
def reference(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ten steps on transformers."""
    found = {}
    for name in ("qwen3", "qwen2", "llama"):
        artifacts = Artifacts(tmp_path_factory.mktemp(name), "hf")
        found[name] = ten_steps(LoraEngine(huggingface.load(models[name], name), artifacts), artifacts)
    return found


def compare(found: dict[str, Any], reference: dict[str, Any]) -> None:
    """Losses to 1e-5, and weights to 1e-5 of their norm."""
    assert found.keys() == reference.keys()
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["norms"], reference["norms"], rtol=1e-5)
    for one, other in zip(found["logprobs"], reference["logprobs"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)
    for model_id in CREATES:
        assert found[f"tokens of {model_id}"] == reference[f"tokens of {model_id}"]
        assert found[model_id].keys() == reference[model_id].keys()
        weights, expected = (
            torch.cat([tensor.flatten() for tensor in one[model_id].values()]) for one in (found, reference)
        )
        assert (weights - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_ten_steps_are_those_on_transformers(
    models: dict[str, Path], reference: dict[str, Any], artifacts: Artifacts, name: str
) -> None:
    engine = LoraEngine(megatron.load(models[name], "test/tiny"), artifacts)
    compare(ten_steps(engine, artifacts), reference[name])


# -- several processes ----------------------------------------------------------------------------


def together(engine: Any, artifacts: Artifacts) -> dict[str, Any]:
    return {"steps": ten_steps(engine, artifacts), "facts": engine.facts}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_two_processes_train_as_one(
    models: dict[str, Path], reference: dict[str, Any], tmp_path: Path, name: str, mesh: str
) -> None:
    ranks, stages = MESHES[mesh]
    found = lead(together, models[name], tmp_path, ranks=ranks, stages=stages)
    compare(found["steps"], reference[name])
    facts = found["facts"]
    divided = tuple(facts.versions[f"{kind}_parallel"] for kind in ("tensor", "pipeline"))
    assert (facts.engine, *divided) == ("megatron", str(ranks // stages), str(stages))


def two_each(engine: Any, artifacts: Artifacts) -> dict[str, Any]:
    return ten_steps(engine, artifacts, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [("qwen3-tied", "pipeline"), ("qwen3", "both")])
def test_so_do_stages_with_a_tied_head_and_stages_of_slices(
    models: dict[str, Path], artifacts: Artifacts, tmp_path: Path, name: str, mesh: str
) -> None:
    ranks, stages = MESHES[mesh]
    plain = LoraEngine(huggingface.load(models[name], name), artifacts)
    compare(lead(two_each, models[name], tmp_path, ranks=ranks, stages=stages), two_each(plain, artifacts))


def promises(engine: Any, artifacts: Artifacts) -> dict[str, Any]:
    """What must hold to the last bit in one group; and what another engine is to go on from."""
    found: dict[str, Any] = {}
    engine.create("m", CREATES["all"])
    alone = train(engine, "m", 3)
    end = state(engine, "m", "alone")
    engine.remove("m")
    engine.create("m", CREATES["all"])
    engine.create("n", CREATES["head"])
    between = []
    for step in range(3):
        between += train(engine, "m", 1, seed=10 * step)
        train(engine, "n", 1, seed=5)
    found["models in turn are as if alone"] = between == alone and state(engine, "m", "turns") == end

    refused = []
    for perform, op in (
        (engine.forward_backward, ForwardBackward(body([]))),
        (
            engine.forward_backward,
            ForwardBackward(body([datum([1], target_tokens=[1], weights=[3e38])] * 2)),
        ),
        (engine.optim_step, OptimStep(learning_rate=float("nan"))),
        (engine.optim_step, OptimStep(learning_rate=1e30, weight_decay=1e30)),
        (engine.load_state, LoadState("nowhere", optimizer=True)),
    ):
        try:
            perform("m", op)
        except UserError as error:
            refused.append(str(error))
    found["refused"] = refused
    found["an error changes nothing"] = state(engine, "m", "after errors") == end

    engine.forward_backward("m", ForwardBackward(body(supervised(77))))
    engine.snapshot("m", "snap", b"book", "o")
    before = state(engine, "m", "before")
    ahead = train(engine, "m", 2, seed=50)
    last = state(engine, "m", "last")
    engine.restore("m", "snap")
    found["a snapshot brings back every bit"] = (
        state(engine, "m", "restored") == before
        and train(engine, "m", 2, seed=50) == ahead
        and state(engine, "m", "again") == last
        and engine.read_book("snap") == b"book"
    )
    engine.save_state("m", SaveState("saved"), "o")
    engine.create("copy", CreateModel(1, 1.0, 0, source="saved", optimizer=True))
    found["a saved state is whole"] = (
        state(engine, "copy", "copy")["weights.safetensors"] == last["weights.safetensors"]
    )
    found["base"] = {"logits": _scores(engine)}
    return found


def _scores(engine: Engine) -> list[np.ndarray]:
    """Log-probabilities of IDS under the model as it is."""
    data = [datum(row[:-1].tolist(), target_tokens=row[1:].numpy(), weights=[0.0] * 32) for row in IDS]
    return logprobs(engine.forward("m", Forward(body(data))).body)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor", "pipeline"])
def test_two_processes_keep_the_promises_of_one(models: dict[str, Path], tmp_path: Path, mesh: str) -> None:
    ranks, stages = MESHES[mesh]
    found = lead(promises, models["qwen3"], tmp_path, ranks=ranks, stages=stages)
    ended = found.pop("base")
    assert [text.partition(":")[0] for text in found.pop("refused")] == [
        "data is empty",
        "data[0]",
        "learning_rate is nan",
        "the step makes weights that are not finite",
        "nowhere is not in the artifact folder of this trainer",
    ]
    assert found == dict.fromkeys(found, True)
    # Another engine, on one process, goes on from their snapshot.
    for module in (huggingface, megatron):
        artifacts = Artifacts(tmp_path / "artifacts", "other")
        engine = LoraEngine(module.load(models["qwen3"], "test/tiny"), artifacts)
        engine.restore("m", "snap")
        train(engine, "m", 2, seed=50)
        for one, other in zip(_scores(engine), ended["logits"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=5e-5)


# -- the end --------------------------------------------------------------------------------------


def two_steps(engine: Engine, artifacts: Artifacts) -> str:
    engine.create("m", CREATES["all"])
    train(engine, "m", 2)
    return "done"


def breaks(engine: Any) -> None:
    def optim_step(model_id: str, op: OptimStep) -> dict[str, float]:
        raise RuntimeError("broken here")

    engine.optim_step = optim_step


def drifts(engine: Any) -> None:
    honest = engine.optim_step

    def optim_step(model_id: str, op: OptimStep) -> dict[str, float]:
        metrics: dict[str, float] = honest(model_id, op)
        return {**metrics, "grad_norm": metrics["grad_norm"] * (1 + 1e-15)}

    engine.optim_step = optim_step


def dies(engine: Any) -> None:
    engine.optim_step = lambda model_id, op: os.kill(os.getpid(), signal.SIGKILL)


def dies_within(engine: Any) -> None:
    """While another stage waits for its gradients."""
    Pipeline.send = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]


def hangs_within(engine: Any) -> None:
    Pipeline.send = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[method-assign]


def hangs(engine: Any) -> None:
    engine.optim_step = lambda model_id, op: os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize(("hangs", "stages"), [(hangs, 1), (hangs_within, 2)])
def test_a_rank_that_hangs_is_not_waited_for_for_ever(
    models: dict[str, Path], tmp_path: Path, hangs: Any, stages: int
) -> None:
    group = start(two_steps, models["qwen3"], tmp_path, hangs, patience=20.0, stages=stages)
    try:
        _, errors = group.processes[0].communicate(timeout=120)
        assert "a rank has failed" in errors
        assert group.processes[0].returncode == 1
    finally:
        group.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "stages", "statuses", "says"),
    [
        (breaks, 1, [1, 1], "a rank has failed"),
        (drifts, 1, [1, 0], "the ranks disagree"),
        (dies, 1, [1, -signal.SIGKILL], "a rank has failed"),
        (dies_within, 2, [1, -signal.SIGKILL], "a rank has failed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_is_out_of_step_ends_all(
    models: dict[str, Path], tmp_path: Path, spoil: Any, stages: int, statuses: list[int], says: str
) -> None:
    group = start(two_steps, models["qwen3"], tmp_path, spoil, stages=stages)
    try:
        _, errors = group.processes[0].communicate(timeout=120)
        assert says in errors
        assert group.wait() == statuses
        assert not group.result.exists()
    finally:
        group.kill()


def killed(engine: Engine, artifacts: Artifacts) -> None:
    two_steps(engine, artifacts)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_without_its_leader_a_rank_ends(models: dict[str, Path], tmp_path: Path) -> None:
    group = start(killed, models["qwen3"], tmp_path)
    try:
        assert group.wait() == [-signal.SIGKILL, 0]
    finally:
        group.kill()
