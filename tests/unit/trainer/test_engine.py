"""The engine, on each base model, against plain transformers, peft, autograd and torch.optim.AdamW."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from trainer_kit import CREATE, STEP, body, datum, logprobs, state, supervised, train
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from tink.errors import BackendError, UserError
from tink.limits import LOGIT_CELLS
from tink.trainer import batch
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import lora, recompute
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.head import Head
from tink.trainer.engines.lora_engine import LoraEngine
from tink.trainer.engines.parallel import Ranks
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    LoadState,
    ModelInfo,
    OptimStep,
    SampleRequest,
    SaveState,
)

# peft asks transformers an outdated question, and warns of merging tied weights, which we never do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def export(engine: LoraEngine, artifacts: Artifacts, model_id: str, path: str) -> Path:
    engine.export_adapter(model_id, ExportAdapter(path), path)
    return artifacts.root / path


def plain_logprobs(model: torch.nn.Module, data: list) -> list[torch.Tensor]:
    """One datum at a time, no padding."""
    decoded = batch.decode(body(data), 320, 96).data
    return [
        model(input_ids=one.tokens.unsqueeze(0))
        .logits[0]
        .log_softmax(-1)
        .gather(-1, one.targets.unsqueeze(-1))
        .squeeze(-1)
        for one in decoded
    ]


@pytest.mark.parametrize("bits", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_training_is_what_peft_and_adamw_do(
    engine: LoraEngine, artifacts: Artifacts, model_dir: Path, bits: tuple[int, int, int]
) -> None:
    attn, mlp, unembed = map(bool, bits)
    engine.create("m", CreateModel(4, 8.0, 7, attn, mlp, unembed))
    start = export(engine, artifacts, "m", "start")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # In float64: what differs is our own rounding, which AdamW makes much of where a gradient is small.
    peft = PeftModel.from_pretrained(base, start, is_trainable=True).double()
    parameters = [p for p in peft.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(
        t.numel() for t in load_file(start / "adapter_model.safetensors").values()
    )
    optimizer = torch.optim.AdamW(parameters, betas=(STEP.beta1, STEP.beta2), eps=STEP.eps)
    for step in range(4):
        for part in range(2):
            data = supervised(10 * step + part)
            result = engine.forward_backward("m", ForwardBackward(body(data)))
            plain = plain_logprobs(peft, data)
            weights = [one.inputs["weights"] for one in batch.decode(body(data), 320, 96).data]
            loss = -sum((w * lp).sum() for w, lp in zip(weights, plain, strict=True))
            loss.backward()
            assert result.loss == pytest.approx(loss.item(), abs=1e-4)
            for ours, theirs in zip(logprobs(result.body), plain, strict=True):
                np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
        hyper = OptimStep(
            learning_rate=0.003 * (step + 1),
            eps=STEP.eps,
            weight_decay=0.1 * step,
            grad_clip_norm=2.0 * step,
        )
        metrics = engine.optim_step("m", hyper)
        norm = torch.nn.utils.clip_grad_norm_(parameters, hyper.grad_clip_norm or 1e9)
        optimizer.param_groups[0].update(lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        assert metrics == {"grad_norm": pytest.approx(norm.item(), rel=1e-5), "step": step + 1}
    trained = load_file(export(engine, artifacts, "m", "end") / "adapter_model.safetensors")
    theirs = {
        name.replace(".default", ""): value for name, value in peft.named_parameters() if "lora_" in name
    }
    assert trained.keys() == theirs.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value.double(), theirs[name].detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_gives_the_same_logits_in_peft(
    tmp_path: Path, kind: ModuleType, model_dir: Path, artifacts: Artifacts, tied: bool
) -> None:
    if tied:
        directory = tmp_path / "tied"
        config = AutoConfig.from_pretrained(model_dir, tie_word_embeddings=True)
        model = Qwen3ForCausalLM(config)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(directory)
        for file in model_dir.glob("tokenizer*"):
            (directory / file.name).write_bytes(file.read_bytes())
        model_dir = directory
    engine = LoraEngine(kind.load(model_dir, "test"), artifacts)
    engine.create("m", CREATE)
    train(engine, "m")
    data = supervised(99)
    ours = logprobs(engine.forward("m", Forward(body(data))).body)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    adapter = export(engine, artifacts, "m", "x")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], "lm_head" in config["target_modules"]) == (4, 8, True)
    with torch.no_grad():
        theirs = plain_logprobs(PeftModel.from_pretrained(base, adapter), data)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)


def test_a_fresh_adapter_is_the_base_model(engine: LoraEngine, model_dir: Path) -> None:
    engine.create("m", CREATE)
    data = supervised()
    with torch.no_grad():
        plain = plain_logprobs(AutoModelForCausalLM.from_pretrained(model_dir), data)
    for ours, theirs in zip(logprobs(engine.forward("m", Forward(body(data))).body), plain, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_chunks_accumulate_like_one_request(engine: LoraEngine, artifacts: Artifacts) -> None:
    data = supervised(lengths=(5, 9, 33, 12))
    for model_id, parts in (("one", [data]), ("two", [data[:1], data[1:]])):
        engine.create(model_id, CREATE)
        losses = [
            engine.forward_backward(model_id, ForwardBackward(body(part))).metrics["loss:sum"]
            for part in parts
        ]
        if model_id == "one":
            total = losses[0]
        assert sum(losses) == pytest.approx(total, abs=1e-4)
        engine.optim_step(model_id, STEP)
    one, two = (
        load_file(export(engine, artifacts, m, m) / "adapter_model.safetensors") for m in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_forward_touches_no_gradient(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    before = state(engine, "m", "a")
    engine.forward("m", Forward(body(supervised())))
    assert state(engine, "m", "b") == before
    assert "gradient.safetensors" not in before


def test_a_step_without_a_gradient_still_counts(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    assert engine.optim_step("m", STEP) == {"grad_norm": 0.0, "step": 1.0}
    assert engine.optim_step("m", STEP)["step"] == 2.0


@pytest.mark.parametrize("k", [1, 3])
def test_many_targets_per_position(engine: LoraEngine, k: int) -> None:
    """(N, K) is K single-target requests on the same text."""
    engine.create("m", CREATE)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 320, 12).tolist()
    targets, weights = random.integers(0, 320, (12, k)), random.normal(size=(12, k))
    wide = engine.forward(
        "m", Forward(body([datum(tokens, target_tokens=targets, weights=weights.astype("f4"))]))
    )
    (found,) = logprobs(wide.body)
    assert found.shape == (12, k)
    total = 0.0
    for column in range(k):
        one = datum(tokens, target_tokens=targets[:, column], weights=weights[:, column].astype("f4"))
        narrow = engine.forward("m", Forward(body([one])))
        np.testing.assert_allclose(logprobs(narrow.body)[0], found[:, column], atol=1e-6)
        total += narrow.metrics["loss:sum"]
    assert wide.metrics["loss:sum"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("unembed", [False, True])
def test_logits_in_pieces_are_the_logits_at_once(
    engine: LoraEngine, monkeypatch: pytest.MonkeyPatch, unembed: bool
) -> None:
    """The piecewise head changes neither losses nor gradients, whether it is trained itself or not."""
    create = CreateModel(rank=4, alpha=8.0, seed=7, train_unembed=unembed)
    engine.create("whole", create)
    engine.create("pieces", create)
    whole = train(engine, "whole")
    monkeypatch.setitem(LOGIT_CELLS, "cpu", 320 * 7)
    for ours, theirs in zip(train(engine, "pieces"), whole, strict=True):
        for one, other in zip(logprobs(ours), logprobs(theirs), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_backward_pass_has_the_adapter_of_the_forward_pass(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is called without one, as by a thread of torch's own, and makes what was not kept."""
    monkeypatch.setitem(LOGIT_CELLS, "cpu", 320 * 7)
    adapter = lora.fresh(ModelInfo(4, 8.0, 7, True, True, True), base.sites)
    ids = torch.arange(20).unsqueeze(0)
    gradients = []
    for outside in (False, True):
        with lora.using(adapter), recompute.within(True):
            logprobs = base.head.logprobs(base.hidden(ids)[0], ids.T)
            within = None if outside else adapter.gradient(logprobs.sum())
        gradients.append(adapter.gradient(logprobs.sum()) if within is None else within)
    assert torch.equal(*gradients)


def test_a_long_sequence_keeps_little_and_has_the_same_gradient_to_the_bit(
    base: BaseModel, artifacts: Artifacts
) -> None:
    """Beyond the tokens of a micro-batch each layer is computed twice."""
    data, gradients = body(supervised(lengths=(60,))), []
    for tokens in (64, 63):
        engine = LoraEngine(base, artifacts, micro_batch_tokens=tokens)
        engine.create("m", CREATE)
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            engine.forward_backward("m", ForwardBackward(data))
        engine.optim_step("m", OptimStep(learning_rate=0.1))
        engine.export_adapter("m", ExportAdapter(f"after-{tokens}"), "o")
        weights = load_file(artifacts.open(f"after-{tokens}")[0] / "adapter_model.safetensors")
        gradients.append((kept.cells, weights))
    (much, whole), (little, again) = gradients
    assert little < much / 2
    assert all(torch.equal(whole[name], again[name]) for name in whole)


class Kept:
    """Counts what the backward pass is left."""

    cells = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.cells += tensor.numel()
        return tensor


# -- bits -----------------------------------------------------------------------------------------


def test_a_snapshot_brings_back_every_bit(base: BaseModel, artifacts: Artifacts) -> None:
    """Accumulated gradient, moments, step and weights; and what follows is the same to the last bit."""
    first = LoraEngine(base, artifacts)
    first.create("m", CREATE)
    train(first, "m")
    first.forward_backward("m", ForwardBackward(body(supervised(77))))
    first.snapshot("m", "snap", b"the book", "o")
    second = LoraEngine(base, Artifacts(artifacts.root, "another"))
    assert second.read_book("snap") == b"the book"
    second.restore("m", "snap")
    assert state(second, "m", "s2") == state(first, "m", "s1")
    assert "gradient.safetensors" in state(first, "m", "s3")
    for one in (first, second):
        one.optim_step("m", STEP)
    assert train(second, "m", seed=5) == train(first, "m", seed=5)
    assert state(second, "m", "e2") == state(first, "m", "e1")


def test_a_redo_gives_the_same_bits_in_another_process(
    engine: LoraEngine, kind: ModuleType, model_dir: Path, artifacts: Artifacts
) -> None:
    engine.create("m", CREATE)
    answers = hashlib.sha256(b"".join(train(engine, "m"))).hexdigest()
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import hashlib
from pathlib import Path
from trainer_kit import CREATE, state, train
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines.lora_engine import LoraEngine
from {kind.__name__} import load
base = load(Path({str(model_dir)!r}), "test/tiny")
engine = LoraEngine(base, Artifacts(Path({str(artifacts.root)!r}), "b"))
engine.create("m", CREATE)
print(hashlib.sha256(b"".join(train(engine, "m"))).hexdigest())
print(state(engine, "m", "there"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [answers, str(state(engine, "m", "here"))]


def test_models_trained_side_by_side_are_as_if_alone(base: BaseModel, artifacts: Artifacts) -> None:
    """Different ranks and targets, in threads, with sampling between them."""
    creates = {
        "a": CREATE,
        "b": CreateModel(rank=2, alpha=4.0, seed=1, train_mlp=False),
        "c": CreateModel(rank=8, alpha=32.0, seed=2, train_unembed=False),
    }
    alone, together = LoraEngine(base, artifacts), LoraEngine(base, Artifacts(artifacts.root, "w2"))
    for engine in (alone, together):
        for model_id, create in creates.items():
            engine.create(model_id, create)
    expected = {model_id: train(alone, model_id, 3) for model_id in creates}
    found: dict[str, list[bytes]] = {}
    threads = [
        threading.Thread(target=lambda m=m: found.update({m: train(together, m, 3)})) for m in creates
    ]
    request = SampleRequest("s", [1, 2, 3], 1, num_samples=4, max_tokens=30, ignore_eos=True)
    sample = alone.sample(request)
    for thread in threads:
        thread.start()
    samples = [together.sample(request) for _ in range(5)]
    for thread in threads:
        thread.join()
    assert found == expected
    assert samples == [sample] * 5
    for model_id in creates:
        assert state(together, model_id, f"t/{model_id}") == state(alone, model_id, f"a/{model_id}")


def test_the_same_seed_starts_the_same_whatever_else_exists(base: BaseModel, artifacts: Artifacts) -> None:
    first, second = LoraEngine(base, artifacts), LoraEngine(base, Artifacts(artifacts.root, "w2"))
    second.create("other", CREATE)
    for engine in (first, second):
        engine.create("m", CREATE)
    assert state(first, "m", "1") == state(second, "m", "2")
    part = first._models["m"].adapter
    a = part.split(part.values)["model.layers.1.mlp.up_proj.lora_A"]
    assert a.abs().max() <= 32**-0.5
    assert a.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.2)


def test_another_seed_starts_otherwise(engine: LoraEngine) -> None:
    for seed in (7, 8, 7 + 2**32):
        engine.create(f"m{seed}", msgspec.structs.replace(CREATE, seed=seed))
    first, *others = (trained.adapter.values for trained in engine._models.values())
    drawn = first != 0  # the rest is B
    for other in others:
        assert (first[drawn] == other[drawn]).float().mean() < 0.01


# -- saved states ---------------------------------------------------------------------------------


def test_a_saved_state_can_be_loaded(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    train(engine, "m")
    reference = state(engine, "m", "reference")
    engine.forward_backward("m", ForwardBackward(body(supervised(5))))
    engine.save_state("m", SaveState("saved"), "o")
    assert "gradient.safetensors" in state(engine, "m", "kept"), "saving keeps what is accumulated"
    train(engine, "m")
    engine.load_state("m", LoadState("saved", optimizer=True))
    assert state(engine, "m", "loaded") == reference, "loading forgets what is accumulated"
    info = engine.create("n", CreateModel(1, 1.0, 0, source="saved", optimizer=True))
    assert (info.rank, info.alpha, info.seed) == (4, 8.0, 7)
    assert state(engine, "n", "n") == reference


def test_weights_alone_start_a_new_optimizer(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    train(engine, "m")
    engine.save_state("m", SaveState("saved"), "o")
    engine.load_state("m", LoadState("saved", optimizer=False))
    assert engine.optim_step("m", STEP)["step"] == 1.0


def test_a_state_of_another_shape_is_refused(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    engine.create("n", CreateModel(8, 8.0, 7))
    engine.save_state("m", SaveState("saved"), "o")
    before = state(engine, "n", "before")
    with pytest.raises(UserError, match="rank 4, the model's is 8"):
        engine.load_state("n", LoadState("saved", optimizer=True))
    with pytest.raises(UserError, match="not in the artifact folder"):
        engine.load_state("n", LoadState("nowhere", optimizer=True))
    assert state(engine, "n", "after") == before


def test_a_damaged_state_is_never_loaded(engine: LoraEngine, artifacts: Artifacts) -> None:
    engine.create("m", CREATE)
    engine.save_state("m", SaveState("saved"), "o")
    file = artifacts.root / "saved" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BackendError, match="damaged"):
        engine.load_state("m", LoadState("saved", optimizer=False))


def test_saving_twice_gives_the_same_files(engine: LoraEngine) -> None:
    """What a redo after a crash does: the path is there already, and stays."""
    engine.create("m", CREATE)
    first = engine.save_state("m", SaveState("saved"), "m:2:j")
    assert all(isinstance(file, File) for file in first)
    assert engine.save_state("m", SaveState("saved"), "m:2:j") == first
    with pytest.raises(BackendError, match="exists already"):
        engine.save_state("m", SaveState("saved"), "m:3:k")


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "says"),
    [
        (ForwardBackward(body([])), "empty"),
        (
            ForwardBackward(
                body(
                    [
                        *supervised(),
                        datum([1, 2], target_tokens=[1, 2], logprobs=[-200.0] * 2, advantages=[1.0] * 2),
                    ][3:],
                    "importance_sampling",
                )
            ),
            r"data\[0\]: the loss is -?inf",
        ),
        (
            ForwardBackward(body([datum([1], target_tokens=[1], weights=np.float32([3e38]))] * 2)),
            "not finite|overflow",
        ),
        (OptimStep(learning_rate=float("nan")), "learning_rate"),
        (OptimStep(beta1=1.0), "beta1"),
    ],
)
def test_a_failed_operation_changes_nothing(engine: LoraEngine, op: object, says: str) -> None:
    engine.create("m", CREATE)
    train(engine, "m")
    engine.forward_backward("m", ForwardBackward(body(supervised(50))))
    before = state(engine, "m", "before")
    perform = engine.optim_step if isinstance(op, OptimStep) else engine.forward_backward
    with pytest.raises(UserError, match=says):
        perform("m", op)
    assert state(engine, "m", "after") == before


def test_a_model_that_diverged_says_so(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    with pytest.raises(UserError, match="not finite: lower"):
        engine.optim_step("m", OptimStep(learning_rate=1e30, weight_decay=1e30))
    engine.forward_backward("m", ForwardBackward(body(supervised())))
    engine.optim_step("m", OptimStep(learning_rate=1e30))
    with pytest.raises(UserError, match="training has diverged"):
        engine.forward("m", Forward(body(supervised())))
    engine.export_adapter("m", ExportAdapter("x"), "o")
    with pytest.raises(UserError, match="training has diverged"):
        engine.sample(SampleRequest("s", [1, 2, 3], 1, adapter="x", max_tokens=3))


def test_in_bfloat16_a_new_model_learns_from_its_first_step_and_the_same_after_a_snapshot(
    kind: ModuleType, model_dir: Path, artifacts: Artifacts
) -> None:
    engine = LoraEngine(kind.load(model_dir, "test", "bfloat16"), artifacts)
    engine.create("m", CREATE)
    engine.snapshot("m", "new", b"", "o")
    steps = []
    for _ in range(2):
        result = engine.forward_backward("m", ForwardBackward(body(supervised())))
        steps.append((result.body, engine.optim_step("m", STEP)))
        engine.restore("m", "new")
    assert steps[0] == steps[1]
    assert steps[0][1]["grad_norm"] > 0


@pytest.mark.parametrize("likely", [0.0, 6.0, 12.0])
def test_the_gradient_of_a_likely_token_is_as_exact_as_bfloat16_is(likely: float) -> None:
    """Where p is almost 1 all that is left of it is 1 - p."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(512, 64, generator=draw, dtype=torch.bfloat16) / 8
    targets = torch.randint(512, (40, 1), generator=draw)
    hidden = torch.randn(40, 64, generator=draw, dtype=torch.bfloat16)
    hidden += (likely * weight[targets[:, 0]]).to(torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        x = hidden.to(dtype).requires_grad_()
        if dtype is torch.bfloat16:
            found = Head(weight, None, Ranks.alone()).logprobs(x, targets)
        else:
            found = (x @ weight.to(dtype).T).log_softmax(-1).gather(-1, targets)
        gradients.append(torch.autograd.grad(found.sum(), x)[0].double())
    ours, exact = gradients
    assert (ours - exact).norm() < 0.02 * exact.norm()


def test_a_base_in_bfloat16_trains_too(kind: ModuleType, model_dir: Path, artifacts: Artifacts) -> None:
    engine = LoraEngine(kind.load(model_dir, "test", "bfloat16"), artifacts)
    engine.create("m", CREATE)
    data = supervised()
    before = engine.forward("m", Forward(body(data))).metrics["loss:sum"]
    train(engine, "m")
    engine.forward_backward("m", ForwardBackward(body(data)))
    for _ in range(5):
        engine.optim_step("m", STEP)
        after = engine.forward_backward("m", ForwardBackward(body(data))).metrics["loss:sum"]
    assert after < before
    engine.export_adapter("m", ExportAdapter("x"), "o")
    request = SampleRequest("s", [1, 2, 3], 1, adapter="x", max_tokens=3, ignore_eos=True)
    assert engine.sample(request).tokens_out == 3


@pytest.mark.parametrize(
    ("create", "says"),
    [
        (CreateModel(0, 8.0, 1), "rank 0"),
        (CreateModel(4, 0.0, 1), "alpha"),
        (CreateModel(4, 8.0, 1, False, False, False), "nothing to train"),
        (CreateModel(4, 8.0, 1, source="../outside"), "relative path"),
    ],
)
def test_a_model_that_cannot_be_made(engine: LoraEngine, create: CreateModel, says: str) -> None:
    with pytest.raises(UserError, match=says):
        engine.create("m", create)
    with pytest.raises(UserError, match="does not exist"):
        engine.optim_step("m", STEP)


def test_removed_is_gone(engine: LoraEngine) -> None:
    engine.create("m", CREATE)
    engine.remove("m")
    with pytest.raises(UserError):
        engine.remove("m")


def test_the_base_is_never_touched(engine: LoraEngine, kind: ModuleType, model_dir: Path) -> None:
    engine.create("m", CREATE)
    ids = torch.arange(20).unsqueeze(0)

    def logits(base: BaseModel) -> torch.Tensor:
        with torch.inference_mode():
            return base.head.logits(base.hidden(ids))

    before = logits(engine._base)
    train(engine, "m")
    assert torch.equal(logits(engine._base), before)
    assert torch.equal(logits(kind.load(model_dir, "again")), before)
    assert Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_vocab_size() <= 320
