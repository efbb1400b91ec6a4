"""A plain Megatron-LM text generation server, to its client: what it is told from, what is asked of it, and
what becomes of what it answers. The double answers as the sources of Megatron-LM do (as the real one of
megatron-core does: tests/acceptance/test_text_generation.py)."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tink.backends import text_generation
from tink.backends.text_generation import TextGenerationClient
from tink.backends.trainer import TrainerGone
from tink.errors import BackendError, StartupError, UserError
from tink.limits import TEXT_GENERATION_CONTEXT
from tink.pretrained import Text
from tink.wire import tink_train
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import SampleReply, SampleRequest
from tink.world import World

Answer = Callable[[httpx.Request], httpx.Response]

URL = "http://megatron"
END = 0  # <end>


def bytes_tokenizer(begin: bool = False) -> Tokenizer:
    """A token for each byte, <end> and <begin>; `begin`: it puts that before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": END, "<begin>": 1} | {letter: 2 + at for at, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<end>", "<begin>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 1)]
        )
    return tokenizer


def write_model(directory: Path, *, begin: bool = False, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    bytes_tokenizer(begin).save(str(directory / "tokenizer.json"))
    fields = {"model_type": "llama", "max_position_embeddings": 100, "vocab_size": 258, "eos_token_id": END}
    (directory / "config.json").write_text(json.dumps(fields | config))
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(write_model(tmp_path_factory.mktemp("models") / "bytes"))


class Plain:
    """Megatron-LM: continues each prompt by `drawn`, as far as it is asked to. `calls`: the fields that
    came. `told`: what of the answer it gives (older ones have no tokens). `answer` takes the place of its
    samples, `instead` that of all it says."""

    def __init__(self, text: Text, drawn: str = "abcdefgh") -> None:
        self.text, self.drawn = text, drawn
        self.calls: list[dict[str, Any]] = []
        self.told = {"text", "tokens", "logprobs", "segments"}
        self.answer: Answer | None = None
        self.instead: Answer | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.instead is not None:
            return self.instead(request)
        if request.url.path != "/api":
            return httpx.Response(404, html="<h1>Not Found</h1>")
        if request.method != "PUT":
            return httpx.Response(405, json={"message": "The method is not allowed for the requested URL."})
        fields = json.loads(request.content)
        if "prompts" not in fields:
            return httpx.Response(400, json="prompts argument required")
        self.calls.append(fields)
        if self.answer is not None:
            return self.answer(request)
        prompts = [self.text.encode(prompt) for prompt in fields["prompts"]]
        new = self.text.encode_part(self.drawn)[: fields["tokens_to_generate"]]
        rows = [[*prompt, *new] for prompt in prompts]
        found = {
            "text": [self.text.decode(row) for row in rows],
            "tokens": rows,
            "logprobs": [[-0.25 * place for place in range(1, len(row))] for row in rows],
            "segments": [[self.text.decode([token]) for token in row] for row in rows],
        }
        return httpx.Response(200, json={name: found[name] for name in found if name in self.told})


class OneServer(World):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        return httpx.MockTransport(self._answer)


@asynccontextmanager
async def talking_to(server: Plain) -> AsyncIterator[TextGenerationClient]:
    async with text_generation.connect(
        URL, OneServer(server), slots=2, text=server.text, name="a/model"
    ) as client:
        yield client


@pytest.fixture
def server(text: Text) -> Plain:
    return Plain(text)


@pytest.fixture
async def client(server: Plain) -> AsyncIterator[TextGenerationClient]:
    async with talking_to(server) as client:
        yield client


def request(text: Text, prompt: str = "Once", **fields: Any) -> SampleRequest:
    return SampleRequest("s", text.encode(prompt), **{"seed": 5, "max_tokens": 4} | fields)


def drawn(text: Text, reply: SampleReply) -> list[tuple[str, list[float], str]]:
    """Of each sample: its text, logprobs, and what has ended it."""
    assert reply.state == "done"
    return [
        (
            text.decode(np.frombuffer(one.tokens, "<i4").tolist()),
            np.frombuffer(one.logprobs, "<f4").tolist(),
            pb.StopReason.Name(one.stop_reason).removeprefix("STOP_REASON_").lower(),
        )
        for one in pb.SampleResponse.FromString(reply.body).sequences
    ]


# -- which server it is ---------------------------------------------------------------------------


def _tink(asked: httpx.Request) -> httpx.Response:
    if asked.url.path == "/v1/health":
        return httpx.Response(200, json={"protocol": "tink-train/1", "incarnation": "i", "state": "ready"})
    return httpx.Response(400, json="prompts argument required")


def _absent(asked: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        (_tink, False),
        (_absent, False),
        (lambda _: httpx.Response(502, text="Bad Gateway"), False),
        (lambda _: httpx.Response(200, text="<h1>It works</h1>"), False),
        (lambda _: httpx.Response(200, json={"status": "ok"}), False),
        (lambda _: httpx.Response(404, json="not here"), False),
        # Newer ones have a health of their own, of another form.
        (
            lambda asked: (
                httpx.Response(200, json={"status": "ok", "ready": True})
                if asked.method == "GET"
                else httpx.Response(400, json="prompts argument required")
            ),
            True,
        ),
    ],
)
async def test_a_plain_server_is_told_from_others(answer: Answer, plain: bool) -> None:
    assert await text_generation.recognised(URL, OneServer(answer)) is plain


async def test_a_plain_server_is_recognised(server: Plain, client: TextGenerationClient) -> None:
    assert await text_generation.recognised(URL, OneServer(server))
    health, info = await client.health(), await client.info()
    assert (health.protocol, health.state) == (tink_train.PROTOCOL, "ready")
    assert (info.base_model, info.max_context, info.capabilities) == ("a/model", 100, ["sample"])
    assert info.incarnation == health.incarnation == (await client.state()).incarnation


async def test_a_server_that_is_another_one_by_now_is_lost(
    server: Plain, client: TextGenerationClient
) -> None:
    server.instead = lambda _: httpx.Response(200, text="<h1>It works</h1>")
    with pytest.raises(TrainerGone, match="is no Megatron-LM text generation server any more"):
        await client.health()
    server.instead = _absent
    with pytest.raises(TrainerGone, match="does not answer: refused"):
        await client.health()


def test_the_text_side_of_a_model_is_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json cannot be read: .*No such file"):
        Text.load(tmp_path)
    directory = write_model(tmp_path, eos_token_id=[0, 1], bos_token_id=1)
    found = Text.load(directory)
    assert (found.arch, found.context, found.vocab_size, found.eos, found.bos) == (
        "llama", 100, 258, {0, 1}, 1,
    )  # fmt: skip
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert Text.load(directory).eos == {1}
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=r"tokenizer\.json is no tokenizer"):
        Text.load(directory)


def test_what_a_tokenizer_was_last_used_for_is_not_done_again(tmp_path: Path) -> None:
    """Transformers saves how it last cut and padded texts."""
    directory = write_model(tmp_path)
    saved = bytes_tokenizer(False)
    saved.enable_truncation(3)
    saved.enable_padding(length=8)
    saved.save(str(directory / "tokenizer.json"))
    found = Text.load(directory)
    assert found.added == ()
    assert len(found.encode("abcdef")) == 6


def test_a_text_of_signs_for_no_character_is_cut_in_pieces_in_time(text: Text) -> None:
    tokens = text.encode("\ufffd" * 3000)
    pieces = text.pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == "\ufffd" * 3000


# -- samples --------------------------------------------------------------------------------------


async def test_a_sample_goes_there_as_text_and_comes_back_as_tokens(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    sent = request(text, num_samples=2, top_k=30, temperature=0.5)
    reply = await client.sample(sent)
    assert drawn(text, reply) == [("abcd", [-1.0, -1.25, -1.5, -1.75], "length")] * 2
    assert (reply.tokens_in, reply.tokens_out) == (4, 8)
    assert server.calls == [
        {
            "prompts": ["Once", "Once"],
            "tokens_to_generate": 4,
            "logprobs": True,
            "temperature": 0.5,
            "top_k": 30,
            "top_p": 0.0,
            "random_seed": 5,
            "no_log": True,
        }
    ]


async def test_a_server_that_gives_no_tokens_tells_them_by_its_segments(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    expected = drawn(text, await client.sample(request(text)))
    server.told -= {"tokens"}
    assert drawn(text, await client.sample(request(text))) == expected
    server.told -= {"segments"}
    with pytest.raises(BackendError, match="a text that does not tell its tokens"):
        await client.sample(request(text))


async def test_what_a_sampler_asks_for_is_asked_of_the_server(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    async def asked(**fields: Any) -> dict[str, Any]:
        server.calls.clear()
        await client.sample(request(text, **fields))
        (call,) = server.calls
        return call

    greedy = await asked(temperature=0.0, top_k=7, top_p=0.5, num_samples=5)
    assert (greedy["temperature"], greedy["top_k"], greedy["top_p"]) == (1.0, 1, 0.0)
    assert len(greedy["prompts"]) == 1
    plain = await asked(max_tokens=None)
    assert (plain["tokens_to_generate"], plain["top_k"], plain["top_p"]) == (96, 0, 0.0)
    assert (await asked(top_p=0.25))["top_p"] == 0.25
    # Numbers go through float32 there.
    assert (await asked(seed=2**40 + 3))["random_seed"] == 3
    assert (await asked(max_tokens=0))["tokens_to_generate"] == 1


async def test_greedy_and_empty_samples_are_copies(client: TextGenerationClient, text: Text) -> None:
    greedy = drawn(text, await client.sample(request(text, temperature=0.0, num_samples=3)))
    assert len(greedy) == 3
    assert len(set(map(str, greedy))) == 1
    assert (
        drawn(text, await client.sample(request(text, max_tokens=0, num_samples=2)))
        == [("", [], "length")] * 2
    )


async def test_many_samples_go_in_calls_of_128_with_seeds_of_their_own(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    assert len(drawn(text, await client.sample(request(text, num_samples=300)))) == 300
    assert [(len(call["prompts"]), call["random_seed"]) for call in server.calls] == [
        (128, 5),
        (128, 133),
        (44, 261),
    ]


@pytest.mark.parametrize(
    ("said", "asked", "expected"),
    [
        ("ab", 4, ("ab", "stop")),  # newer servers leave the end of the sequence out
        ("ab<end>", 4, ("ab<end>", "stop")),
        ("abc<end>", 4, ("abc<end>", "stop")),
        ("abcd", 4, ("abcd", "length")),
        ("", 4, ("", "stop")),
    ],
)
async def test_what_has_ended_a_sample_is_told(
    server: Plain,
    client: TextGenerationClient,
    text: Text,
    said: str,
    asked: int,
    expected: tuple[str, str],
) -> None:
    server.drawn = said
    ((shown, logprobs, reason),) = drawn(text, await client.sample(request(text, max_tokens=asked)))
    assert (shown, reason) == expected
    assert len(logprobs) == len(text.encode(shown))


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ({"stop_strings": ["cd"]}, "abcd"),
        ({"stop_strings": ["x", "ef", "d"]}, "abcd"),
        ({"stop_strings": ["x"]}, "abcdefgh"),
        ({"stop_tokens": "e"}, "abcde"),
        ({"stop_tokens": "e", "stop_strings": ["b"]}, "ab"),
        ({"stop_strings": ["Once"]}, "abcdefgh"),  # in the prompt, it ends nothing
    ],
)
async def test_a_sample_is_cut_at_the_first_stop_which_stays(
    client: TextGenerationClient, text: Text, stops: dict[str, Any], expected: str
) -> None:
    if "stop_tokens" in stops:
        stops = stops | {"stop_tokens": text.encode(stops["stop_tokens"])}
    ((shown, logprobs, reason),) = drawn(text, await client.sample(request(text, max_tokens=8, **stops)))
    assert shown == expected
    assert len(logprobs) == len(expected)
    assert reason == ("length" if expected == "abcdefgh" else "stop")


async def test_a_prompt_is_scored(client: TextGenerationClient, text: Text) -> None:
    async def scores(**fields: Any) -> list[float]:
        reply = await client.sample(request(text, prompt_logprobs=True, **fields))
        return np.frombuffer(pb.SampleResponse.FromString(reply.body).prompt_logprobs, "<f4").tolist()

    np.testing.assert_array_equal(await scores(), [math.nan, -0.25, -0.5, -0.75])
    np.testing.assert_array_equal(await scores(prompt_logprobs_last_n=2), [math.nan, math.nan, -0.5, -0.75])
    np.testing.assert_array_equal(await scores(max_tokens=0), [math.nan, -0.25, -0.5, -0.75])


# -- tokens and text ------------------------------------------------------------------------------


async def test_a_prompt_that_is_of_no_text_is_refused_and_not_sent(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    whole = text.encode("世界")
    assert drawn(text, await client.sample(request(text, "世界")))
    server.calls.clear()
    for prompt in (whole[:-1], [*whole, 258], [-1]):
        with pytest.raises(UserError, match=r"of any text|the vocabulary is 0 to 257"):
            await client.sample(SampleRequest("s", prompt, 5, max_tokens=1))
    assert server.calls == []


async def test_a_tokenizer_that_begins_texts_is_left_to_do_so(tmp_path: Path) -> None:
    text = Text.load(write_model(tmp_path, begin=True))
    server = Plain(text)
    async with talking_to(server) as client:
        assert drawn(text, await client.sample(request(text)))[0][0] == "abcd"
        assert server.calls[0]["prompts"] == ["Once"]
        with pytest.raises(UserError, match="are not those of any text"):
            await client.sample(SampleRequest("s", text.encode("Once")[1:], 5, max_tokens=1))


async def test_a_server_with_another_tokenizer_is_found_out(server: Plain, text: Text) -> None:
    async with talking_to(server) as client:
        client._text = replace(text, _tokenizer=bytes_tokenizer(begin=True), added=(1,))
        with pytest.raises(BackendError, match="its tokenizer is not that of TINK_HF_MODEL"):
            await client.sample(SampleRequest("s", [1, *text.encode("Once")], 5, max_tokens=1))


# -- refusals and failures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"seeded": True},
            "seed: which tokens are drawn by it is what a plain Megatron-LM text generation",
        ),
        ({"adapter": "adapters/a"}, "this sampler has trained weights"),
        ({"ignore_eos": True}, "stop: an empty list"),
        ({"topk_prompt_logprobs": 2}, "topk_prompt_logprobs: this is what"),
        ({"topk_sample_logprobs": 2}, "topk_sample_logprobs: this is what"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k: this is what"),
        ({"targets": [[1], [2], [3]]}, "targets: this is what"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 1025}, "num_samples is 1025"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": 101.0}, "temperature is 101.0: it must be 0 to 100.0 here"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 1001}, "top_k is 1001"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 3, "top_p": 0.5}, "top_k and top_p together"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 4}, "must be 1 to 3"),
        ({"prompt": []}, "the prompt has 0 tokens; it must have 1 to 99"),
        ({"prompt": [5] * 100}, "the prompt has 100 tokens; it must have 1 to 99"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_its_name_and_not_sent(
    server: Plain, client: TextGenerationClient, text: Text, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        await client.sample(SampleRequest("s", **{"prompt": text.encode("Once"), "seed": 1} | fields))
    assert says in str(error.value)
    assert server.calls == []


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        # Most of its complaints have the status of an answer.
        (
            httpx.Response(200, json="top_k must be equal to or greater than 0"),
            UserError,
            "refuses it: top_k",
        ),
        (httpx.Response(400, json="prompts is empty"), UserError, "refuses it: prompts is empty"),
        (httpx.Response(500, json={"message": "Internal Server Error"}), BackendError, r"500.*restart it"),
        (httpx.Response(503, text="no"), TrainerGone, "answers 503"),
        (httpx.Response(200, text="<h1>hello</h1>"), BackendError, "not an answer"),
        (httpx.Response(200, json={"text": []}), BackendError, "0 samples and 0 rows of logprobs"),
        (httpx.Response(200, json={"text": ["x"], "tokens": [[5]]}), BackendError, "1 samples and 0 rows"),
        (
            httpx.Response(200, json={"text": ["x"], "tokens": [[5]], "logprobs": [[]]}),
            BackendError,
            "read the prompt as other tokens",
        ),
    ],
)
async def test_whatever_goes_wrong_is_said(
    server: Plain,
    client: TextGenerationClient,
    text: Text,
    answer: httpx.Response,
    kind: type[Exception],
    says: str,
) -> None:
    server.answer = lambda _: answer
    before = (await client.health()).incarnation
    with pytest.raises(kind, match=says):
        await client.sample(request(text))
    # Whether it is the same one after a lost call is not known.
    assert ((await client.health()).incarnation == before) is (kind is not TrainerGone)


async def test_logprobs_that_are_not_those_of_the_tokens_are_refused(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    rows = [text.encode("Onceab")]
    server.answer = lambda _: httpx.Response(
        200, json={"text": ["Onceab"], "tokens": rows, "logprobs": [[-1.0, None]]}
    )
    with pytest.raises(BackendError, match="1 logprobs for 6 tokens"):
        await client.sample(request(text))


@pytest.mark.parametrize(
    ("row", "scored", "says"),
    [
        ("Once" + "a", [-1.0] * 3 + [1e300], "a log-probability that is none"),
        (2**40, [-1.0] * 4, "a token id outside of its vocabulary of 258"),
        (-1, [-1.0] * 4, "a token id outside"),
    ],
)
async def test_numbers_that_cannot_be_are_refused(
    server: Plain, client: TextGenerationClient, text: Text, row: str | int, scored: list[float], says: str
) -> None:
    tokens = text.encode(row) if isinstance(row, str) else [*text.encode("Once"), row]
    server.answer = lambda _: httpx.Response(
        200, json={"text": ["Oncea"], "tokens": [tokens], "logprobs": [scored]}
    )
    with pytest.raises(BackendError, match=says):
        await client.sample(request(text))


async def test_more_than_was_asked_for_is_cut(
    server: Plain, client: TextGenerationClient, text: Text
) -> None:
    tokens = text.encode("Once" + "a" * 50)
    server.answer = lambda _: httpx.Response(
        200, json={"text": ["x"], "tokens": [tokens], "logprobs": [[-1.0] * (len(tokens) - 1)]}
    )
    reply = await client.sample(request(text, max_tokens=3))
    (sequence,) = pb.SampleResponse.FromString(reply.body).sequences
    assert (len(sequence.tokens), len(sequence.logprobs)) == (12, 12)


async def test_a_lost_call_is_lost(server: Plain, client: TextGenerationClient, text: Text) -> None:
    server.answer = _absent
    with pytest.raises(TrainerGone, match="does not answer: refused"):
        await client.sample(request(text))


def test_no_more_is_asked_of_it_than_such_servers_are_started_with(tmp_path: Path) -> None:
    directory = write_model(tmp_path, max_position_embeddings=32768)
    assert text_generation.load(str(directory)).context == TEXT_GENERATION_CONTEXT
    write_model(tmp_path, max_position_embeddings=None)
    with pytest.raises(StartupError, match="does not say max_position_embeddings"):
        text_generation.load(str(directory))
