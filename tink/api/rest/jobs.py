"""The operations: what a client sends, as the job that the SDK would have sent."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from tink import limits
from tink.api import waiting
from tink.api.call import MEDIA_JSON, Call, identifier
from tink.api.chat import Template
from tink.api.rest import datums, forms
from tink.api.rest.promises import Submitted, key_of
from tink.domain import ids, keys, messages, requests, rows
from tink.domain.ids import Place
from tink.domain.requests import OpName, Prompt
from tink.errors import MalformedRequest, NotFound, failed
from tink.pretrained import Text

# -- a model's life ---------------------------------------------------------------------------------


async def add_lora(call: Call) -> Submitted:
    """The key names the model, so that a repeat is of the same one."""
    sent = await call.json(forms.AddLora)
    key = key_of(call)
    number = ids.number(key or call.service.world.new_id())
    session_id = await _session(call)
    place = Place(session_id, ids.model_id(session_id, number))
    body = requests.CreateModel(
        session_id=place.session_id,
        model_seq_id=number,
        base_model=sent.base_model,
        lora_config=requests.LoraConfig(
            rank=sent.rank,
            seed=sent.seed,
            train_unembed=sent.train_unembed,
            train_mlp=sent.train_mlp,
            train_attn=sent.train_attn,
            alpha=sent.alpha,
        ),
        user_metadata=sent.user_metadata,
    )
    promise: messages.Promise = await call.ask(
        messages.SubmitTraining(
            tenant=call.tenant,
            op="create_model",
            session_id=place.session_id,
            model_id=place.model_id,
            seq_id=0,
            model_seq_id=number,
            body=msgspec.json.encode(body),
            key=key,
        )
    )
    return Submitted([promise.request_id], promise.model_id)


async def _session(call: Call) -> str:
    created: messages.Created = await call.ask(
        messages.CreateSession(
            tenant=call.tenant, display_name="the REST API", idempotency_key=keys.REST_SESSION
        )
    )
    return created.id


async def remove_lora(call: Call) -> Submitted:
    """Once, whoever asks; one that failed is tried again."""
    sent = await call.json(forms.RemoveLora)
    body = requests.UnloadModel(sent.model_id)
    return await _submit(call, "unload_model", sent.model_id, msgspec.json.encode(body), keys.UNLOAD)


async def optim(call: Call) -> Submitted:
    sent = await call.json(forms.Optim)
    return await _command(
        call, "optim_step", requests.OptimStep(sent.model_id, adam_params=sent.adam_params)
    )


async def save_weights(call: Call) -> Submitted:
    sent = await call.json(forms.Save)
    body = requests.SaveWeights(**msgspec.structs.asdict(sent))
    return await _command(call, "save_weights", body)


async def save_weights_for_sampler(call: Call) -> Submitted:
    sent = await call.json(forms.Save)
    body = requests.SaveWeightsForSampler(**msgspec.structs.asdict(sent))
    if sent.path is None:
        number = ids.number(key_of(call) or call.service.world.new_id())
        body = msgspec.structs.replace(body, sampling_session_seq_id=number)
    return await _command(call, "save_weights_for_sampler", body)


async def load_weights(call: Call) -> Submitted:
    sent = await call.json(forms.Load)
    body = requests.LoadWeights(sent.path, optimizer=sent.optimizer, model_id=sent.model_id)
    return await _command(call, "load_weights", body)


async def forward(call: Call) -> Submitted:
    return await _batch(call, "forward")


async def forward_backward(call: Call) -> Submitted:
    return await _batch(call, "forward_backward")


Command = requests.OptimStep | requests.SaveWeights | requests.SaveWeightsForSampler | requests.LoadWeights


async def _command(call: Call, op: OpName, body: Command) -> Submitted:
    return await _submit(call, op, str(body.model_id), msgspec.json.encode(body), key_of(call))


async def _batch(call: Call, op: OpName) -> Submitted:
    body = await call.body(MEDIA_JSON, limits.MAX_TRAINING_BODY)
    text = await call.text(body, limits.MAX_TRAINING_BODY)
    batch = await call.offload(body, datums.decode, text)
    side = await _side(call, "training") if batch.has_chats else None
    # In a thread: a tokenizer and thousands of small packs would be felt in the loop.
    encoded = await call.service.world.run_sync(_encode, batch, side, op == "forward")
    return await _submit(call, op, batch.model_id, encoded, key_of(call))


def _encode(batch: datums.Batch, side: Any, forward_only: bool) -> bytes:
    return datums.encode(batch, side, forward_only=forward_only)


async def _submit(call: Call, op: OpName, model_id: str, body: bytes, key: str | None) -> Submitted:
    place = _place(model_id)
    promise: messages.Promise = await call.ask(
        messages.SubmitTraining(
            tenant=call.tenant,
            op=op,
            session_id=place.session_id,
            model_id=place.model_id,
            seq_id=None,
            body=body,
            key=key,
        )
    )
    return Submitted([promise.request_id], promise.model_id)


def _place(model_id: str) -> Place:
    place = Place.of_model(model_id)
    if place is None:
        raise NotFound(f"{model_id[:80]!r} is no model's id: take that of add_lora")
    identifier(model_id)
    return place


async def _side(call: Call, use: Literal["training", "sampling"]) -> tuple[Text, Template]:
    found: str | None = await call.ask(messages.GetTokenizer(tenant=call.tenant, use=use))
    return await call.service.texts.of(found)


# -- samples ----------------------------------------------------------------------------------------


async def sample(call: Call) -> Submitted:
    """A job for each prompt."""
    sent = await call.json(forms.Sample)
    prompts = await _prompts(call, sent)
    key = key_of(call)
    sampler = await _sampler_of_key(call, key) or await _sampler(call, sent)
    jobs = []
    for number, tokens in enumerate(prompts):
        body = {
            "model_id": sent.model_id,
            "model_path": sent.model_path,
            "base_model": sent.base_model,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
            "prompts": len(prompts),
            "sampling_params": sent.sampling_params,
            "num_samples": sent.num_samples,
        }
        promise: messages.Promise = await call.ask(
            messages.SubmitSample(
                tenant=call.tenant,
                sampler_id=sampler,
                seq_id=None,
                body=msgspec.json.encode(body),
                num_samples=sent.num_samples,
                seed=sent.sampling_params.seed,
                key=keys.prompt(number, key),
            )
        )
        jobs.append(promise.request_id)
    return Submitted(jobs, sent.model_id)


async def _prompts(call: Call, sent: forms.Sample) -> list[list[int]]:
    kinds = [kind for kind in (sent.prompt, sent.prompts, sent.messages) if kind is not None]
    if len(kinds) != 1:
        raise MalformedRequest("a sample needs one of prompt, prompts and messages")
    world = call.service.world
    if (chat := sent.messages) is not None:
        text, template = await _side(call, "sampling")
        return [await world.run_sync(lambda: text.encode_part(template.prompt(chat)))]
    given = [sent.prompt] if sent.prompt is not None else sent.prompts or []
    if not any(isinstance(prompt, str) for prompt in given):
        return [_tokens(prompt, None) for prompt in given]
    text, _ = await _side(call, "sampling")
    return await world.run_sync(lambda: [_tokens(prompt, text) for prompt in given])


def _tokens(prompt: str | list[int] | Prompt, text: Text | None) -> list[int]:
    """`text` is there for a prompt that is one."""
    if isinstance(prompt, str):
        assert text is not None, "a prompt of text comes with a tokenizer"
        return text.encode(prompt)
    return prompt if isinstance(prompt, list) else prompt.tokens


async def _sampler_of_key(call: Call, key: str | None) -> str | None:
    """That of a request that comes again: its model may have been trained since, or be gone."""
    if key is None:
        return None
    known: rows.Job | None = await call.ask(messages.GetSample(tenant=call.tenant, key=key))
    return None if known is None else known.sampler_id


async def _sampler(call: Call, sent: forms.Sample) -> str:
    sources = [name for name in (sent.model_id, sent.model_path, sent.base_model) if name is not None]
    if len(sources) != 1:
        raise MalformedRequest("a sample needs one of model_id, model_path and base_model")
    if sent.model_id is not None:
        return await _newest(call, _place(sent.model_id))
    session_id = await _session(call)
    if sent.model_path is not None:
        view: messages.CheckpointView = await call.ask(
            messages.GetCheckpoint(tenant=call.tenant, address=sent.model_path)
        )
        return await _of_path(call, session_id, sent.model_path, view.row.checkpoint_id)
    sampler: messages.Created = await call.ask(
        messages.CreateSampler(
            tenant=call.tenant,
            session_id=session_id,
            sampling_seq_id=ids.number(str(sent.base_model)),
            base_model=sent.base_model,
        )
    )
    return sampler.id


async def _newest(call: Call, place: Place) -> str:
    """A sampler of the model's weights as the jobs that have come leave them. If they are not saved yet,
    they are now, once for all that ask: the key is that of the last job that changes them."""
    last: rows.Job = await call.ask(messages.GetWeights(tenant=call.tenant, model_id=place.model_id))
    if last.op == "save_weights_for_sampler":
        outcome = await waiting.outcome(call, last.job_id, math.inf)
        assert outcome is not None, "that is when it ended"
        result = outcome.result or {}
        if isinstance(sampler := result.get("sampling_session_id"), str):
            return sampler
        if outcome.state == "done":
            return await _of_path(call, place.session_id, str(result.get("path")), last.job_id)
    key = keys.weights(last.seq_id)
    number = ids.number(f"{place.model_id} {key}")
    body = requests.SaveWeightsForSampler(place.model_id, sampling_session_seq_id=number)
    saving = await _submit(call, "save_weights_for_sampler", place.model_id, msgspec.json.encode(body), key)
    outcome = await waiting.outcome(call, saving.jobs[0], math.inf)
    assert outcome is not None, "that is when it ended"
    if outcome.state != "done":
        text = f"the weights to sample from could not be saved: {outcome.error}"
        raise failed(outcome.category, text)
    return str((outcome.result or {}).get("sampling_session_id"))


async def _of_path(call: Call, session_id: str, path: str, checkpoint_id: str) -> str:
    """An address may be used again: the checkpoint's id tells which weights are meant."""
    created: messages.Created = await call.ask(
        messages.CreateSampler(
            tenant=call.tenant,
            session_id=session_id,
            sampling_seq_id=ids.number(checkpoint_id),
            model_path=path,
        )
    )
    return created.id
