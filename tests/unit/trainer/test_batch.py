"""What a request body may hold, and what is said of one that may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_kit import body, chunk, datum, sparse, supervised, tensor

from tink.errors import MalformedRequest, UserError
from tink.trainer import batch
from tink.wire import tinker_pb2 as pb


def decode(data: list[pb.Datum], loss_fn: str = "cross_entropy", **kwargs: object) -> batch.Batch:
    return batch.decode(body(data, loss_fn, **kwargs), vocab_size=100, context=50)


def good(**changes: object) -> pb.Datum:
    return datum([1, 2, 3], **{"target_tokens": [2, 3, 4], "weights": [1.0, 0.5, -2.0]} | changes)


def test_chunks_are_one_input() -> None:
    message = good()
    del message.model_input[:]
    message.model_input.extend([chunk([1]), chunk([]), chunk([2, 3])])
    assert decode([message]).data[0].tokens.tolist() == [1, 2, 3]


def test_dtypes_are_widened() -> None:
    one = decode(
        [
            good(
                target_tokens=tensor([2, 3, 4], pb.DTYPE_INT32),
                weights=tensor([1.0, 0.5, -2.0], pb.DTYPE_BFLOAT16),
            )
        ]
    ).data[0]
    assert one.targets.dtype == torch.int64
    assert one.inputs["weights"].tolist() == [1.0, 0.5, -2.0]


def test_sparse_tensors_are_zero_where_they_list_nothing() -> None:
    targets = [[0, 7], [0, 0], [8, 9]]
    weights = [[0.0, 0.5], [0.0, 0.0], [1.5, 0.0]]
    one = decode([good(target_tokens=sparse(targets), weights=sparse(weights))]).data[0]
    assert one.targets.tolist() == targets
    assert one.inputs["weights"].tolist() == weights
    assert one.columns == 2


def test_unknown_inputs_are_ignored() -> None:
    assert set(decode([good(mask=[1.0])]).data[0].inputs) == {"weights"}


def test_a_list_needs_no_shape() -> None:
    message = good()
    del message.loss_fn_inputs["weights"].shape[:]
    assert decode([message]).data[0].inputs["weights"].shape == (3,)


def test_the_newer_configuration_wins() -> None:
    message = pb.ForwardBackwardRequest(loss_fn="dro", data=[policy()])
    message.loss_fn_config["beta"] = 1.0
    assert batch.decode(message.SerializeToString(), 100, 50).config == {"beta": 1.0}
    message.loss_fn_config_v2["beta"].number = 2.0
    assert batch.decode(message.SerializeToString(), 100, 50).config == {"beta": 2.0}


def policy(**changes: object) -> pb.Datum:
    inputs = {"target_tokens": [2, 3, 4], "logprobs": [-1.0] * 3, "advantages": [1.0] * 3}
    return datum([1, 2, 3], **inputs | changes)


def image() -> pb.Datum:
    message = good()
    message.model_input.add().image.data = b"png"
    return message


def dmel() -> pb.Datum:
    message = good()
    message.model_input.add().dmel.dmel = b"sound"
    return message


def broken_rows() -> pb.Tensor:
    message = sparse([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    message.sparse_csr.col_indices = np.array([0, 5, 0], "<i8").tobytes()
    return message


def torn() -> pb.Tensor:
    message = tensor([1.0, 2.0, 3.0])
    message.dense = message.dense[:-1]
    return message


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (image(), "chunk 1 is image"),
        (dmel(), "chunk 1 is dmel"),
        (datum([], target_tokens=[], weights=[]), "0 tokens"),
        (datum([1] * 51, target_tokens=[1] * 51, weights=[1.0] * 51), "1 to 50"),
        (datum([1, 2, 100], target_tokens=[2, 3, 4], weights=[1.0] * 3), "model_input has token id 100"),
        (good(target_tokens=[2, 3, -100]), "weight 0"),
        (good(target_tokens=[2.0, 3.0, 4.0]), "must be integers"),
        (good(target_tokens=[2, 3]), r"target_tokens has shape \(2,\).*\(3,\) or \(3, K\)"),
        (good(weights=[1.0, 2.0]), "weights has shape"),
        (good(weights=[1.0, float("nan"), 1.0]), "weights has a number that is not finite"),
        (good(weights=[1.0, float("inf"), 1.0]), "not finite"),
        (good(weights=broken_rows(), target_tokens=[[1, 2]] * 3), "indices do not fit"),
        (good(weights=torn()), "11 bytes"),
        (good(weights=pb.Tensor(dense=b"\0" * 12, shape=[3])), "dtype"),
        (good(weights=pb.Tensor(dense=b"\0" * 12, dtype=pb.DTYPE_FLOAT32, shape=[4])), "do not fill"),
        (datum([1, 2, 3], target_tokens=[2, 3, 4]), "lacks weights"),
    ],
)
def test_an_error_names_the_datum_and_the_field(wrong: pb.Datum, says: str) -> None:
    with pytest.raises(UserError, match=rf"^data\[1\]: .*{says}"):
        decode([good(), wrong])


def test_only_the_losses_that_allow_it_take_many_targets() -> None:
    wide = policy(target_tokens=[[1, 2]] * 3, logprobs=[[-1.0, -1.0]] * 3, advantages=[[1.0, 1.0]] * 3)
    assert decode([wide], "importance_sampling").data[0].columns == 2
    with pytest.raises(UserError, match=r"it must be \(3,\)$"):
        decode([wide], "ppo")


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(UserError, match="at least one datum"):
        decode([])


def test_a_few_bytes_cannot_fill_the_memory() -> None:
    bomb = sparse([[1.0, 0.0]])
    bomb.shape[1] = 2**40
    with pytest.raises(UserError, match="cells"):
        decode([good(weights=bomb)])


def test_garbage_is_refused() -> None:
    with pytest.raises(MalformedRequest):
        batch.decode(b"\xff\xff\xff", 100, 50)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(UserError):
        batch.decode(data, 100, 50)


def of_length(length: int, columns: int = 1) -> batch.Datum:
    shape = (length,) if columns == 1 else (length, columns)
    return batch.Datum(torch.zeros(length, dtype=torch.int64), torch.zeros(shape), {})


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 2)), min_size=1, max_size=40))
def test_micro_batches_keep_order_and_budget(lengths: list[tuple[int, int]]) -> None:
    data = [of_length(*one) for one in lengths]
    groups = list(batch.micro_batches(data, 4096))
    assert [id(one) for group in groups for one in group] == [id(one) for one in data]
    for group in groups:
        assert len({one.columns for one in group}) == 1
        padded = len(group) * max(batch.width(one.length) for one in group)
        assert padded <= 4096 or len(group) == 1


def test_answers_of_one_shape_share_a_record() -> None:
    values = [torch.zeros(3), torch.ones(2), torch.zeros(2, 2), torch.ones(4)]
    message = pb.ForwardBackwardOutput.FromString(batch.encode(values, {"loss:sum": 1.0}))
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 1, 1]
    assert list(message.loss_fn_outputs[1].fields["logprobs"].trailing_shape) == [2]
    assert message.loss_fn_output_type == "ArrayRecord"
    assert dict(message.metrics) == {"loss:sum": 1.0}


def test_the_sdk_reads_what_is_written_and_writes_what_is_read() -> None:
    from tinker import types
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.proto.response_conv import deserialize_forward_backward_output

    inputs = {"target_tokens": torch.tensor([[0, 4], [0, 0], [0, 0]]), "weights": torch.zeros(3, 2)}
    sent = types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)
    call = types.ForwardBackwardInput(data=[sent], loss_fn="cross_entropy", loss_fn_config=None)
    request = types.ForwardBackwardRequest(forward_backward_input=call, model_id="m", seq_id=1)
    encoded = forward_backward_request_to_proto(request).SerializeToString()
    assert batch.decode(encoded, 100, 50).data[0].targets.tolist() == [[0, 4], [0, 0], [0, 0]]

    values = [torch.rand(3), torch.rand(2, 2)]
    read = deserialize_forward_backward_output(batch.encode(values, {"loss:sum": 2.0}))
    assert read.metrics == {"loss:sum": 2.0}
    for value, found in zip(values, read.loss_fn_outputs, strict=True):
        torch.testing.assert_close(found["logprobs"].to_torch(), value)


def test_a_batch_counts_its_tokens() -> None:
    assert batch.decode(body(supervised(lengths=(5, 7))), 320, 50).tokens == 12
