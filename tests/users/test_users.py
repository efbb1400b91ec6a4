"""tools/concurrent_users says what is so, and finds what is not: with a worker that is only pretended."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter

import httpx
import pytest

from tests.users import report, trial
from tests.users.__main__ import _report
from tests.users.trial import most_running, p95
from tests.users.user import Outcome, Work

WORK = Work("a/model", steps=2, chats=2, words=3, rank=4)


class Worker:
    """Answers are functions of the adapter's seed and of the step, unless the test has others."""

    def __init__(self):
        self.lives = Counter()
        self.seeds = {}
        self.refused = {}

    def __call__(self, request):
        route, sent = request.url.path, json.loads(request.content)
        if answers := self.refused.get(route):
            return answers.pop(0)
        if route == "/add_lora":
            self.lives[sent["seed"]] += 1
            model = f"{sent['seed']}-{self.lives[sent['seed']]}"
            self.seeds[model] = sent["seed"]
            return httpx.Response(200, json={"model_id": model})
        return httpx.Response(200, json=self.answer(route, self.seeds[sent["model_id"]], sent))

    def answer(self, route, seed, sent):
        number = seed + len(str(sent)) / 7
        return {"loss": number, "metrics": {"grad_norm": number}, "sequences": [{"logprobs": [number]}]}


async def hold(worker, users=3):
    async with httpx.AsyncClient(transport=httpx.MockTransport(worker), base_url="http://tink") as client:
        return await trial.hold(client, WORK, users)


def status(found, at_least=None, fair=False):
    return _report(found, Namespace(at_least=at_least, fair=fair, json=False))


async def test_users_who_get_what_they_got_alone_are_a_success(capsys):
    found = await hold(Worker())
    assert found.identical == [True] * 3
    assert [len(outcome.losses) for outcome in found.together] == [2] * 3
    assert status(found) == 0
    out = capsys.readouterr().out
    assert "3 of 3 users succeeded, 3 got what they got alone" in out
    assert out.splitlines()[1].split()[-1] == "yes"


async def test_the_last_bit_of_one_number_is_found(capsys):
    class Worse(Worker):
        def answer(self, route, seed, sent):
            answer = super().answer(route, seed, sent)
            if route == "/sample" and self.lives[seed] == 2 and seed == 2:
                number = answer["sequences"][0]["logprobs"][0]
                answer["sequences"][0]["logprobs"] = [number * (1 + 2**-52)]
            return answer

    found = await hold(Worse())
    assert found.identical == [True, False, True]
    assert status(found) == 1
    captured = capsys.readouterr()
    assert captured.err == "concurrent_users: user 2 got other numbers than alone\n"
    assert "3 of 3 users succeeded, 2 got what they got alone" in captured.out


async def test_a_user_who_is_refused_is_told_in_the_worker_s_words_and_the_others_go_on(capsys):
    class Refusing(Worker):
        def __call__(self, request):
            if request.url.path == "/optim" and self.seeds[json.loads(request.content)["model_id"]] == 3:
                return httpx.Response(502, json={"detail": "no trainer"})
            return super().__call__(request)

    found = await hold(Refusing())
    assert (found.succeeded, found.identical) == (2, [True, True, False])
    assert status(found) == 1
    captured = capsys.readouterr()
    line = "concurrent_users: user 3: HTTPError: POST /optim: 502 no trainer\n"
    assert captured.err == line * 2, "alone, and at once"
    assert "2 of 3 users succeeded" in captured.out


async def test_a_worker_that_has_too_much_to_do_is_asked_again(autojump_clock):
    worker = Worker()
    worker.refused["/fwdbwd"] = [httpx.Response(429, headers={"Retry-After": "7"})] * 2
    assert (await hold(worker)).succeeded == 3


@pytest.mark.parametrize(("alone", "at_least", "code"), [(3.0, 1.5, 0), (2.9, 1.5, 1), (1.0, None, 0)])
def test_speed_matters_if_it_is_asked_for(alone, at_least, code):
    found = trial.Trial([Outcome(1)], [Outcome(1)], alone, 2.0)
    assert status(found, at_least) == code


@pytest.mark.parametrize(
    ("waits", "code"),
    [([[1, 2], [2, 1]], 0), ([[1.0] * 9, [1.0] * 8 + [9.0]], 1), ([[1, 2], []], 1), (None, 1)],
)
def test_fair_is_nobody_who_waits_twice_as_long_as_all(waits, code):
    found = trial.Trial([Outcome(1)] * 2, [Outcome(1)] * 2, 1.0, 1.0, waits)
    assert status(found, fair=True) == code
    assert bool(report.problems(found, fair=True)) == bool(code)
    assert status(found) == 0


def test_a_step_waits_as_long_as_its_batch_and_it_together():
    jobs = [("forward_backward", 3.0), ("optim_step", 1.0), ("forward_backward", 2.0), ("optim_step", 4.0)]
    assert trial.step_waits(jobs) == [4.0, 6.0]
    assert trial.step_waits(jobs[1:]) == [6.0]


def test_a_p95_is_what_five_of_a_hundred_exceed():
    assert (p95([3.0]), p95([*range(100)]), p95([*range(20)])) == (3.0, 94, 18)


def test_jobs_that_ran_at_one_time_are_counted_once():
    started, done, failed = (f"job_{word}" for word in ("started", "done", "failed"))
    assert most_running([(started, "a"), (done, "a"), (started, "b"), (failed, "b")]) == 1
    assert most_running([("job_accepted", "a"), (started, "a"), (started, "a"), (started, "b")]) == 2
