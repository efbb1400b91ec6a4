"""Every kind of data that the SDK can send, and what comes back, against a real `tink serve`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.live import LiveServer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def sdk(live_server: LiveServer) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("TINKER_API_KEY", "tml-local")
    patch.setenv("TINKER_BASE_URL", live_server.url)
    service = tinker.ServiceClient()
    [model] = tinker.RestClient().get_server_capabilities().result().supported_models
    training = service.create_lora_training_client(model.model_name, rank=4, seed=1).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    yield SimpleNamespace(service=service, base=model.model_name, training=training, sampler=sampler)
    service.close("success").result()
    patch.undo()


def ints(tokens: list[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens)


def chunked(*parts: list[int]) -> types.ModelInput:
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=part) for part in parts])


def datum(model_input: types.ModelInput, **inputs: Any) -> types.Datum:
    return types.Datum(model_input=model_input, loss_fn_inputs=inputs)


def plain(length: int = 4, seed: int = 0) -> types.Datum:
    tokens = [(7 * i + seed) % 200 + 1 for i in range(length + 1)]
    return datum(ints(tokens[:-1]), target_tokens=tokens[1:], weights=[1.0] * length)


def logprobs(output: Any) -> np.ndarray:
    return output["logprobs"].to_numpy()


# -- training ---------------------------------------------------------------------------------------


def test_text_in_several_chunks_is_the_text_in_one(sdk):
    whole = datum(ints(PROMPT), target_tokens=[1, 2, 3, 4, 5], weights=[1.0] * 5)
    parts = datum(chunked(PROMPT[:2], PROMPT[2:3], PROMPT[3:]), **whole.loss_fn_inputs)
    one, other = sdk.training.forward([whole, parts], "cross_entropy").result().loss_fn_outputs
    assert logprobs(one).tolist() == logprobs(other).tolist()


def test_outputs_come_in_the_order_and_the_shape_of_the_data(sdk):
    data = [plain(length, seed) for seed, length in enumerate([3, 9, 1, 5])]
    result = sdk.training.forward(data, "cross_entropy").result()
    assert [logprobs(output).shape for output in result.loss_fn_outputs] == [(3,), (9,), (1,), (5,)]
    loss = -sum(float(logprobs(output).sum()) for output in result.loss_fn_outputs)
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    alone = sdk.training.forward(data[1:2], "cross_entropy").result().loss_fn_outputs[0]
    np.testing.assert_allclose(logprobs(alone), logprobs(result.loss_fn_outputs[1]), rtol=1e-4, atol=1e-5)


def test_a_batch_that_the_client_splits_is_one_batch(sdk):
    """More than 1,024 data: the chunks are posted side by side, the first one last."""
    data = [plain(2, seed) for seed in range(1030)]
    result = sdk.training.forward_backward(data, "cross_entropy").result(timeout=300)
    assert len(result.loss_fn_outputs) == 1030
    loss = -sum(float(logprobs(output).sum()) for output in result.loss_fn_outputs)
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-4)
    assert logprobs(result.loss_fn_outputs[1029]).shape == (2,)
    sdk.training.optim_step(types.AdamParams(learning_rate=0.0)).result()


def test_dense_targets_of_several_candidates(sdk):
    """(N, K) targets and weights: the soft targets of distillation."""
    targets = torch.tensor([[1, 2], [3, 4], [5, 6]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.25], [0.25, 1.0]])
    wide = datum(ints([9, 8, 7]), target_tokens=targets, weights=weights)
    result = sdk.training.forward_backward([wide], "cross_entropy").result()
    [output] = result.loss_fn_outputs
    assert logprobs(output).shape == (3, 2)
    loss = -float((logprobs(output) * weights.numpy()).sum())
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    for column in range(2):
        narrow = datum(ints([9, 8, 7]), target_tokens=targets[:, column].tolist(), weights=[1.0, 1.0, 1.0])
        [alone] = sdk.training.forward([narrow], "cross_entropy").result().loss_fn_outputs
        np.testing.assert_allclose(logprobs(alone), logprobs(output)[:, column], rtol=1e-5, atol=1e-6)


def test_sparse_tensors_are_their_dense_ones(sdk):
    """The SDK sends a 2-D tensor as CSR when that is smaller; unlisted cells are 0."""
    targets = torch.zeros((6, 40), dtype=torch.int64)
    weights = torch.zeros((6, 40))
    targets[1, 3], weights[1, 3] = 11, 0.5
    targets[4, 30], weights[4, 30] = 12, 1.5
    sparse = datum(
        ints([1, 2, 3, 4, 5, 6]),
        target_tokens=targets,
        weights=weights,
    )
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    result = sdk.training.forward_backward([sparse], "cross_entropy").result()
    narrow = datum(
        ints([1, 2, 3, 4, 5, 6]), target_tokens=[0, 11, 0, 0, 12, 0], weights=[0, 0.5, 0, 0, 1.5, 0]
    )
    expected = sdk.training.forward([narrow], "cross_entropy").result()
    assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    sdk.training.optim_step(types.AdamParams(learning_rate=0.0)).result()


@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        ("dro", {"beta": 0.05}),
        ("gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ],
)
def test_every_loss_of_reinforcement_learning(sdk, loss_fn, config):
    tokens, targets = [3, 4, 5], [4, 5, 6]
    inputs = {"target_tokens": targets, "logprobs": [-5.0, -5.5, -6.0], "advantages": [1.0, -1.0, 0.5]}
    if loss_fn == "gspo":
        inputs["sequence_ratio_mask"] = [1.0, 1.0, 1.0]
    result = sdk.training.forward_backward([datum(ints(tokens), **inputs)], loss_fn, config).result()
    assert math.isfinite(result.metrics["loss:sum"])
    assert logprobs(result.loss_fn_outputs[0]).shape == (3,)
    sdk.training.optim_step(types.AdamParams(learning_rate=0.0)).result()


# -- sampling ---------------------------------------------------------------------------------------


def sample(sdk, num_samples: int = 1, prompt: Any = None, options: Any = None, **params: Any) -> Any:
    params = {"max_tokens": 8, "seed": 3, **params}
    return sdk.sampler.sample(
        prompt or ints(PROMPT), num_samples, types.SamplingParams(**params), **(options or {})
    ).result()


def tokens(answer: Any) -> list[list[int]]:
    return [sequence.tokens for sequence in answer.sequences]


def test_samples_of_one_request_differ_and_a_seed_repeats_them(sdk):
    answer = sample(sdk, num_samples=8)
    assert len({tuple(one) for one in tokens(answer)}) > 1
    assert len({sequence.sequence_id for sequence in answer.sequences}) == 8
    assert tokens(sample(sdk, num_samples=8)) == tokens(answer)
    assert tokens(sample(sdk, num_samples=8, seed=4)) != tokens(answer)
    for sequence in answer.sequences:
        assert len(sequence.logprobs) == len(sequence.tokens) <= 8
        assert all(value <= 0 for value in sequence.logprobs)


def test_without_a_seed_samples_are_random(sdk):
    drawn = {tuple(tokens(sample(sdk, seed=None))[0]) for _ in range(5)}
    assert len(drawn) > 1


def test_greedy_is_temperature_zero_or_one_candidate(sdk):
    greedy = tokens(sample(sdk, temperature=0.0))
    assert tokens(sample(sdk, temperature=0.0, seed=99)) == greedy
    assert tokens(sample(sdk, top_k=1)) == greedy
    assert tokens(sample(sdk, top_p=1e-6)) == greedy


def test_max_tokens_is_a_limit_and_its_absence_none(sdk):
    for limit in (1, 5):
        [sequence] = sample(sdk, max_tokens=limit, stop=[]).sequences
        assert (len(sequence.tokens), sequence.stop_reason) == (limit, "length")


def test_every_form_of_stop(sdk):
    """The stop is part of what is returned: clients look for it there."""
    [free] = sample(sdk, max_tokens=12, stop=[]).sequences
    assert (len(free.tokens), free.stop_reason) == (12, "length")
    third = free.tokens[2]
    cut = free.tokens[: free.tokens.index(third) + 1]
    [by_token] = sample(sdk, max_tokens=12, stop=[third]).sequences
    assert (by_token.tokens, by_token.stop_reason) == (cut, "stop")
    text = sdk.training.get_tokenizer().decode([third])
    if text.strip() and "�" not in text:
        for stop in (text, [text, "never to be seen"]):
            [by_text] = sample(sdk, max_tokens=12, stop=stop).sequences
            assert by_text.stop_reason == "stop"
            assert len(by_text.tokens) <= len(cut)
            assert text in sdk.training.get_tokenizer().decode(by_text.tokens)


def test_prompt_logprobs_are_those_of_training(sdk):
    answer = sample(sdk, options={"include_prompt_logprobs": True})
    assert answer.prompt_logprobs[0] is None
    targets = datum(ints(PROMPT[:-1]), target_tokens=PROMPT[1:], weights=[1.0] * 4)
    [output] = sdk.training.forward([targets], "cross_entropy").result().loss_fn_outputs
    np.testing.assert_allclose(answer.prompt_logprobs[1:], logprobs(output), rtol=1e-4, atol=1e-5)


def test_the_most_likely_tokens_of_the_prompt_and_of_the_samples(sdk):
    answer = sample(
        sdk,
        num_samples=2,
        options={"include_prompt_logprobs": True, "topk_prompt_logprobs": 3, "topk_sample_logprobs": 2},
    )
    assert answer.topk_prompt_logprobs[0] is None
    for candidates, own, token in zip(
        answer.topk_prompt_logprobs[1:], answer.prompt_logprobs[1:], PROMPT[1:], strict=True
    ):
        values = [value for _, value in candidates]
        assert len(candidates) == 3
        assert values == sorted(values, reverse=True)
        assert own <= values[0] + 1e-6
        assert dict(candidates).get(token, own) == pytest.approx(own, abs=1e-5)
    for sequence in answer.sequences:
        assert [len(candidates) for candidates in sequence.topk_logprobs] == [2] * len(sequence.tokens)


def test_only_the_last_prompt_logprobs(sdk):
    whole = sdk.sampler.compute_logprobs(ints(PROMPT)).result()
    last = sdk.sampler.compute_logprobs(ints(PROMPT), prompt_logprobs_last_n=2).result()
    assert last[-2:] == pytest.approx(whole[-2:], abs=1e-5)
    assert all(value is None for value in last[:-2])


def test_alternative_prompt_tokens_are_drawn_and_scored(sdk):
    answer = sample(sdk, options={"prompt_alt_tokens_k": 3})
    assert answer.prompt_alt_tokens.tokens.to_numpy().shape == (4, 3)
    values = answer.prompt_alt_tokens.logprobs.to_numpy()
    assert values.shape == (4, 3)
    assert (values <= 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_logprobs_of_given_tokens_at_each_place_of_the_prompt(sdk, sparse):
    wanted = np.full((4, 2), -1, dtype=np.int64)
    wanted[0, 0], wanted[2, 1], wanted[3, 0] = PROMPT[1], PROMPT[3], PROMPT[4]
    dense = types.TensorData(data=wanted.ravel().tolist(), dtype="int64", shape=[4, 2])
    csr = types.TensorData(
        data=[PROMPT[1], PROMPT[3], PROMPT[4]],
        dtype="int64",
        shape=[4, 2],
        sparse_crow_indices=[0, 1, 1, 2, 3],
        sparse_col_indices=[0, 1, 0],
    )
    options = {"target_prompt_logprobs": csr if sparse else dense, "include_prompt_logprobs": True}
    answer = sample(sdk, options=options)
    own = answer.prompt_logprobs
    grid = answer.target_prompt_logprobs.to_numpy().reshape(4, 2)
    assert [grid[0, 0], grid[2, 1], grid[3, 0]] == pytest.approx([own[1], own[3], own[4]], abs=1e-5)
    assert (grid[wanted == -1] == 0).all()


def test_a_prompt_in_several_chunks(sdk):
    parts = chunked(PROMPT[:1], PROMPT[1:4], PROMPT[4:])
    assert tokens(sample(sdk, prompt=parts)) == tokens(sample(sdk))


# -- what a text model cannot take ------------------------------------------------------------------


def image() -> types.ImageChunk:
    return types.ImageChunk(data=b"\x89PNG\r\n", format="png", expected_tokens=4)


def test_an_image_is_refused_by_name_in_training_and_the_run_goes_on(sdk):
    mixed = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 2]), image()])
    data = datum(mixed, target_tokens=[1] * 6, weights=[1.0] * 6)
    with pytest.raises(tinker.RequestFailedError, match="image") as failed:
        sdk.training.forward_backward([data], "cross_entropy").result()
    assert failed.value.category == types.RequestErrorCategory.User
    assert sdk.training.forward([plain()], "cross_entropy").result().loss_fn_outputs


def test_an_image_is_refused_by_name_in_sampling(sdk):
    mixed = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 2]), image()])
    with pytest.raises(tinker.RequestFailedError, match="image") as failed:
        sample(sdk, prompt=mixed)
    assert failed.value.category == types.RequestErrorCategory.User
