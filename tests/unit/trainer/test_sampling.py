"""Each field of a SampleRequest, and the promises about log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_kit import body, datum, floats, ints, logprobs, sampled, supervised

from tink.errors import BackendError, UserError
from tink.limits import LOGIT_CELLS, MAX_NUM_SAMPLES
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import drawing
from tink.trainer.engines import sampler as sampler_module
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.lora_engine import LoraEngine
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    Forward,
    ForwardBackward,
    OptimStep,
    SampleRequest,
)

PROMPT = [10, 20, 30, 40, 50, 60]


def ask(engine: LoraEngine, **fields: Any) -> pb.SampleResponse:
    defaults = {"sample_id": "s", "prompt": PROMPT, "seed": 1, "max_tokens": 8, "ignore_eos": True}
    return sampled(engine.sample(SampleRequest(**defaults | fields)).body)


def tokens(response: pb.SampleResponse) -> list[list[int]]:
    return [ints(sequence.tokens) for sequence in response.sequences]


def plain(engine: LoraEngine, text: list[int], model_id: str | None = None) -> np.ndarray:
    """log p of every token of the vocabulary after every prefix, by one forward pass: (N, V)."""
    base = engine._base
    with torch.inference_mode():
        return base.head.logits(base.hidden(torch.tensor([text]))[0]).log_softmax(-1).numpy()


@pytest.fixture
def adapted(engine: LoraEngine, artifacts: Artifacts) -> LoraEngine:
    """With a model `m`, trained a little, and exported as `adapter`."""
    engine.create("m", CreateModel(rank=4, alpha=32.0, seed=1))
    for seed in range(3):
        engine.forward_backward("m", ForwardBackward(body(supervised(seed))))
        engine.optim_step("m", OptimStep(learning_rate=0.02))
    engine.export_adapter("m", ExportAdapter("adapter"), "o")
    return engine


# -- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, "adapter"])
@pytest.mark.parametrize("draw", [{}, {"temperature": 0.3, "top_k": 5, "top_p": 0.9}, {"temperature": 0.0}])
def test_sampled_logprobs_are_what_prompt_scoring_and_training_find(
    adapted: LoraEngine, adapter: str | None, draw: dict[str, float]
) -> None:
    """To 1e-4, whatever the draw was from."""
    response = ask(adapted, adapter=adapter, num_samples=5, **draw)
    for sequence in response.sequences:
        text = PROMPT + ints(sequence.tokens)
        again = ask(adapted, adapter=adapter, prompt=text, prompt_logprobs=True, max_tokens=1)
        scored = floats(again.prompt_logprobs)[len(PROMPT) :]
        np.testing.assert_allclose(floats(sequence.logprobs), scored, atol=1e-4)
        if adapter:
            one = datum(text[:-1], target_tokens=text[1:], weights=[0.0] * (len(text) - 1))
            (trained,) = logprobs(adapted.forward("m", Forward(body([one]))).body)
            np.testing.assert_allclose(trained[len(PROMPT) - 1 :], scored, atol=1e-4)


def test_prompt_logprobs_have_no_first(engine: LoraEngine) -> None:
    found = floats(ask(engine, prompt_logprobs=True).prompt_logprobs)
    assert np.isnan(found[0])
    expected = plain(engine, PROMPT)[np.arange(5), PROMPT[1:]]
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)
    assert not ask(engine).prompt_logprobs


def test_only_the_last_n_are_scored_when_asked(engine: LoraEngine) -> None:
    whole = ask(engine, prompt_logprobs=True, topk_prompt_logprobs=2)
    last = ask(engine, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=2)
    found = floats(last.prompt_logprobs)
    assert len(found) == 6
    assert np.isnan(found[:4]).all()
    np.testing.assert_array_equal(found[4:], floats(whole.prompt_logprobs)[4:])
    top = floats(last.topk_prompt_logprobs.logprobs).reshape(6, 2)
    assert (top[:4] == -99999.0).all()
    assert (top[4:] > -99999.0).all()


def test_topk_of_the_prompt(engine: LoraEngine) -> None:
    top = ask(engine, topk_prompt_logprobs=3).topk_prompt_logprobs
    assert (top.k, top.length) == (3, 6)
    ids, values = np.array(ints(top.token_ids)).reshape(6, 3), floats(top.logprobs).reshape(6, 3)
    assert ids[0].tolist() == [0, 0, 0]
    assert values[0].tolist() == [-99999.0] * 3
    expected = plain(engine, PROMPT)[:5]
    np.testing.assert_array_equal(ids[1:, 0], expected.argmax(-1))
    np.testing.assert_allclose(values[1:], np.sort(expected)[:, :-4:-1], atol=1e-5)


def test_topk_of_the_samples(engine: LoraEngine) -> None:
    response = ask(engine, topk_sample_logprobs=3, num_samples=2, temperature=0.0)
    for sequence in response.sequences:
        top = sequence.topk_sampled_logprobs
        assert (top.k, top.length) == (3, 8)
        # Greedy: what was taken is the likeliest.
        assert ints(top.token_ids)[::3] == ints(sequence.tokens)
        np.testing.assert_array_equal(floats(top.logprobs)[::3], floats(sequence.logprobs))


def test_given_tokens_are_scored(engine: LoraEngine) -> None:
    targets = [[5, -1], [6, 7], [-1, -1], [8, 9], [60, 60]]
    found = ask(engine, targets=targets).target_prompt_logprobs
    assert (list(found.shape), found.dtype) == ([5, 2], pb.DTYPE_FLOAT32)
    values = floats(found.dense).reshape(5, 2)
    expected = plain(engine, PROMPT)
    for row, ids in enumerate(targets):
        for column, token in enumerate(ids):
            wanted = 0.0 if token == -1 else expected[row, token]
            assert values[row, column] == pytest.approx(wanted, abs=1e-5)


def test_alternatives_are_drawn_at_every_position(engine: LoraEngine) -> None:
    found = ask(engine, prompt_alt_tokens_k=64).prompt_alt_tokens
    assert list(found.tokens.shape) == list(found.logprobs.shape) == [5, 64]
    assert found.tokens.dtype == pb.DTYPE_INT64
    ids = np.frombuffer(found.tokens.dense, "<i8").reshape(5, 64)
    expected = np.take_along_axis(plain(engine, PROMPT)[:5], ids, axis=1)
    np.testing.assert_allclose(floats(found.logprobs.dense).reshape(5, 64), expected, atol=1e-5)
    assert len(set(ids[0])) > 1, "independent draws"
    greedy = ask(engine, prompt_alt_tokens_k=2, temperature=0.0).prompt_alt_tokens
    ids = np.frombuffer(greedy.tokens.dense, "<i8").reshape(5, 2)
    assert (ids == plain(engine, PROMPT)[:5].argmax(-1, keepdims=True)).all()


def test_scores_in_pieces_are_the_scores_at_once(
    engine: LoraEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "prompt_alt_tokens_k": 3,
        "targets": [[1]] * 5,
    }
    whole = ask(engine, **fields)
    monkeypatch.setitem(LOGIT_CELLS, "cpu", 320 * 2)
    pieces = ask(engine, **fields)
    assert pieces.prompt_alt_tokens.tokens == whole.prompt_alt_tokens.tokens
    assert pieces.topk_prompt_logprobs.token_ids == whole.topk_prompt_logprobs.token_ids
    np.testing.assert_allclose(floats(pieces.prompt_logprobs), floats(whole.prompt_logprobs), atol=1e-5)


# -- drawing --------------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_bytes(adapted: LoraEngine) -> None:
    fields = {"adapter": "adapter", "num_samples": 4, "prompt_logprobs": True, "prompt_alt_tokens_k": 2}
    assert ask(adapted, **fields) == ask(adapted, **fields)


def test_samples_differ_by_seed_and_by_number(engine: LoraEngine) -> None:
    first, second = tokens(ask(engine, num_samples=4)), tokens(ask(engine, num_samples=4, seed=2))
    assert len({tuple(row) for row in first + second}) == 8


def test_a_sample_does_not_hang_on_how_many_there_are(
    engine: LoraEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = tokens(ask(engine, num_samples=5))
    assert tokens(ask(engine, num_samples=2)) == many[:2]
    monkeypatch.setattr(sampler_module, "SAMPLE_ROWS", 2)
    assert tokens(ask(engine, num_samples=5)) == many, "in waves"


def test_temperature_zero_is_greedy(engine: LoraEngine) -> None:
    (found,) = tokens(ask(engine, temperature=0.0, max_tokens=5))
    text = list(PROMPT)
    for token in found:
        assert token == plain(engine, text)[-1].argmax()
        text.append(token)


def test_top_k_one_is_greedy(engine: LoraEngine) -> None:
    assert tokens(ask(engine, top_k=1)) == tokens(ask(engine, temperature=0.0))
    assert tokens(ask(engine, top_p=1e-9)) == tokens(ask(engine, temperature=0.0))


# Without ties: which of two equals top-k keeps is not promised.
LOGITS = st.lists(st.integers(-99, 99), min_size=2, max_size=12, unique=True)


@settings(max_examples=200, deadline=None)
@given(
    LOGITS,
    st.floats(0, 1, exclude_max=True),
    st.floats(1e-3, 5),
    st.integers(-1, 12),
    st.floats(0.01, 1),
)
def test_a_draw_is_among_those_allowed(
    logits: list[int], uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    row = torch.tensor([logits]) / 5
    token = drawing.choose(row, torch.tensor([uniform], dtype=torch.float64), temperature, top_k, top_p)
    probability = (row.double() / temperature).softmax(-1)[0]
    order = probability.argsort(descending=True, stable=True)
    rank = order.tolist().index(int(token))
    if top_k > 0:
        assert probability[token] >= probability[order[min(top_k, len(logits)) - 1]]
        kept = probability[order[: min(top_k, len(logits))]]
        probability = probability / kept.sum()
    assert probability[order[:rank]].sum() < top_p + 1e-9


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        found = drawing.choose(logits, uniform, temperature).bincount(minlength=4) / 20_000
        torch.testing.assert_close(found, (logits[0] / temperature).softmax(-1), atol=0.015, rtol=0)


# -- stops ----------------------------------------------------------------------------------------


def test_the_stop_token_is_part_of_the_answer(engine: LoraEngine) -> None:
    (free,) = tokens(ask(engine, max_tokens=20))
    stop = free[6]
    at = free.index(stop)
    response = ask(engine, max_tokens=20, stop_tokens=[stop])
    assert tokens(response) == [free[: at + 1]]
    assert len(floats(response.sequences[0].logprobs)) == at + 1
    assert response.sequences[0].stop_reason == pb.STOP_REASON_STOP


def test_a_stop_string_is_searched_in_the_text(engine: LoraEngine, base: BaseModel) -> None:
    (free,) = tokens(ask(engine, max_tokens=30))
    text = base.tokenizer.decode(free)
    # Two neighbours that begin and end within tokens.
    stop = next(text[i : i + 3] for i in range(4, len(text) - 3) if "\ufffd" not in text[i : i + 3])
    response = ask(engine, max_tokens=30, stop_strings=["never in it", stop])
    (found,) = tokens(response)
    assert found == free[: len(found)]
    assert stop in base.tokenizer.decode(found)
    assert stop not in base.tokenizer.decode(found[:-1])
    assert response.sequences[0].stop_reason == pb.STOP_REASON_STOP


def likely_eos(
    base: BaseModel, engine: LoraEngine, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[int]]:
    """Declares the fourth token of a free run the end of sequence."""
    (free,) = tokens(ask(engine, max_tokens=20))
    monkeypatch.setattr(engine, "_base", replace(base, eos=frozenset([free[3]])))
    return free.index(free[3]), free


def test_the_models_end_of_sequence_stops_unless_ignored(
    engine: LoraEngine, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, free = likely_eos(base, engine, monkeypatch)
    assert tokens(ask(engine, max_tokens=20, ignore_eos=False)) == [free[: at + 1]]
    assert tokens(ask(engine, max_tokens=20, ignore_eos=True)) == [free]
    # Beside an explicit stop it stays a stop.
    response = ask(engine, max_tokens=20, ignore_eos=False, stop_strings=["never in it"])
    assert tokens(response) == [free[: at + 1]]


def test_rows_that_stop_leave_the_others_as_they_were(engine: LoraEngine) -> None:
    free = tokens(ask(engine, num_samples=6, max_tokens=20))
    stop = free[2][4]
    for row, found in zip(
        free, tokens(ask(engine, num_samples=6, max_tokens=20, stop_tokens=[stop])), strict=True
    ):
        assert found == (row[: row.index(stop) + 1] if stop in row else row)


def test_the_end_of_the_context_is_a_length_stop(engine: LoraEngine) -> None:
    for limit in (None, 10_000):
        response = ask(engine, max_tokens=limit)
        assert len(tokens(response)[0]) == 96 - len(PROMPT)
        assert response.sequences[0].stop_reason == pb.STOP_REASON_LENGTH
    assert len(tokens(ask(engine, prompt=[1] * 96, max_tokens=1))[0]) == 1
    assert tokens(ask(engine, max_tokens=0)) == [[]]


def test_counts_are_reported(engine: LoraEngine) -> None:
    found = engine.sample(SampleRequest("s", PROMPT, 1, num_samples=3, max_tokens=4, ignore_eos=True))
    assert (found.tokens_in, found.tokens_out) == (6, 12)


# -- what cannot be served ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": []}, "0 tokens"),
        ({"prompt": [1] * 97}, "1 to 96"),
        ({"prompt": [320]}, "prompt has token id 320"),
        ({"prompt": [-1]}, "prompt has token id -1"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": MAX_NUM_SAMPLES + 1}, "num_samples"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"topk_prompt_logprobs": 65}, "topk_prompt_logprobs"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": 65}, "prompt_alt_tokens_k"),
        ({"topk_sample_logprobs": 64, "num_samples": 1024, "max_tokens": None}, "do not fit"),
        ({"stop_tokens": [320]}, "stop has token id"),
        ({"stop_tokens": [1] * 65}, "64 stops"),
        ({"stop_strings": [""]}, "empty stop"),
        ({"prompt_logprobs_last_n": 2}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 6}, "1 to 5"),
        ({"targets": [[1]] * 6}, "5 rows"),
        ({"targets": [[1]] * 4 + [[1, 2]]}, "one length"),
        ({"targets": [[1]] * 4 + [[-2]]}, "token id -2"),
        ({"adapter": "../x"}, "relative path"),
        ({"adapter": "missing"}, "not in the artifact folder"),
    ],
)
def test_an_impossible_request_names_its_field(
    engine: LoraEngine, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        ask(engine, **fields)


def test_an_adapter_whose_files_changed_is_refused(adapted: LoraEngine, artifacts: Artifacts) -> None:
    file: Path = artifacts.root / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(BackendError, match="damaged"):
        ask(adapted, adapter="adapter")


def test_an_adapter_stays_what_it_was_when_loaded(adapted: LoraEngine, artifacts: Artifacts) -> None:
    before = ask(adapted, adapter="adapter")
    (artifacts.root / "adapter" / "manifest.json").unlink()
    assert ask(adapted, adapter="adapter") == before


def test_the_adapter_cache_is_bounded(adapted: LoraEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from tink.trainer.engines import states

    monkeypatch.setattr(states, "ADAPTER_CACHE", 2)
    for version in range(4):
        adapted.export_adapter("m", ExportAdapter(f"v{version}"), "o")
        ask(adapted, adapter=f"v{version}")
    assert list(adapted._states._exported) == ["v2", "v3"]


def test_the_sdk_reads_the_answer(engine: LoraEngine) -> None:
    from tinker.proto.response_conv import deserialize_sample_response

    request = SampleRequest(
        "s",
        PROMPT,
        1,
        num_samples=2,
        max_tokens=3,
        ignore_eos=True,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=1,
        prompt_alt_tokens_k=4,
        targets=[[1, 2]] * 5,
    )
    read = deserialize_sample_response(engine.sample(request).body)
    assert [len(sequence.tokens) for sequence in read.sequences] == [3, 3]
    assert [sequence.stop_reason for sequence in read.sequences] == ["length", "length"]
    assert read.prompt_logprobs is not None
    assert read.prompt_logprobs[0] is None
    assert read.topk_prompt_logprobs is not None
    assert read.topk_prompt_logprobs[0] is None
    assert read.target_prompt_logprobs.to_torch().shape == (5, 2)
    assert read.prompt_alt_tokens.tokens.to_torch().shape == (5, 4)
