"""A client's whole flow, with the installed SDK, against TINKER_BASE_URL. Run by test_api_sdk.py in a
process of its own; prints one JSON object of what the SDK understood."""

from __future__ import annotations

import json
import os

import tinker
from tinker import types


def main() -> None:
    seen = {}
    service = tinker.ServiceClient(user_metadata={"from": "a test"})
    training = service.create_lora_training_client("tink/tiny", rank=8, user_metadata={"n": "1"}).result()
    info = training.get_info()
    seen["info"] = [info.model_id, info.model_data.model_name, info.lora_rank]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]},
    )
    forward = training.forward([datum], "cross_entropy")
    backward = training.forward_backward([datum], "cross_entropy")
    step = training.optim_step(types.AdamParams(learning_rate=0.1))
    seen["forward"] = forward.result().metrics
    result = backward.result()
    seen["logprobs"] = result.loss_fn_outputs[0]["logprobs"].to_numpy().tolist()
    seen["metrics"] = result.metrics
    seen["step"] = step.result().metrics
    path = training.save_state("final").result().path
    seen["saved"] = path
    seen["loaded"] = training.load_state_with_optimizer(path).result().path
    named = training.save_weights_for_sampler("sampler").result().path
    again = service.create_training_client_from_state(path).result()
    seen["again"] = again.get_info().model_id
    params = types.SamplingParams(max_tokens=2, stop=["\n"])
    prompt = types.ModelInput.from_ints([1, 2])
    for name, sampler in {
        "ephemeral": training.save_weights_and_get_sampling_client(),
        "named": service.create_sampling_client(model_path=named).result(),
        "base": service.create_sampling_client(base_model="tink/tiny").result(),
    }.items():
        answer = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
        seen[name] = [sequence.tokens for sequence in answer.sequences]
        seen[name + " base"] = sampler.get_base_model()
    try:
        training.optim_step(types.AdamParams(learning_rate=float("nan"))).result()
    except tinker.RequestFailedError as error:
        seen["refused"] = [error.category.value, str(error)]
    seen["after"] = training.optim_step(types.AdamParams()).result().metrics
    rest = service.create_rest_client()
    seen["runs"] = [run.training_run_id for run in rest.list_training_runs().result().training_runs]
    service.close("success").result()
    print(json.dumps(seen), flush=True)


main()
# Native threads of the SDK's abort the interpreter's end now and then.
os._exit(0)
