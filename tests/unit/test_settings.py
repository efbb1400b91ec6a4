"""Settings: what wins, what is refused, and in which words."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from pathlib import Path

import pytest

from tink import http_server
from tink.actors import embedded
from tink.cli import serve, vllm
from tink.cli.external import external
from tink.cli.main import main
from tink.errors import StartupError
from tink.home import Home
from tink.settings import Settings


def load(arguments=None, **environment):
    return Settings.load(environment, **(arguments or {}))


def refusal(**environment):
    with pytest.raises(StartupError) as caught:
        load(**environment)
    return str(caught.value).splitlines()


def test_nothing_set_is_a_worker_on_loopback_with_the_embedded_engine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-a-user")
    settings = load()
    assert (settings.host, settings.port, settings.home) == (
        "127.0.0.1",
        8400,
        Path("/home/of-a-user/.tink"),
    )
    assert settings.routes == ("hf", "hf")
    assert settings.artifact_root == Path("/home/of-a-user/.tink/artifacts")
    assert settings.tenants == {}
    assert not settings.beyond_loopback


@pytest.mark.parametrize(
    ("arguments", "environment", "port"),
    [
        ({"port": 1}, {"TINK_PORT": "2", "PORT": "3"}, 1),
        ({"port": 0}, {"TINK_PORT": "2"}, 0),
        ({"port": None}, {"TINK_PORT": "2", "PORT": "3"}, 2),
        ({}, {"PORT": "3"}, 3),
        ({}, {"TINK_PORT": "", "PORT": "3"}, 3),
        ({}, {}, 8400),
    ],
)
def test_an_argument_wins_over_tink_port_over_port_over_the_default(arguments, environment, port):
    assert load(arguments, **environment).port == port


def test_what_does_not_matter_to_a_caller_cannot_be_wrong():
    environment = {"TINK_HOME": "/srv/tink", "TINK_PORT": "none", "TINK_HOEM": "/srv"}
    settings = Settings.load(environment, only=["TINK_HOME", "TINK_ARTIFACTS"])
    assert (settings.home, settings.artifacts, settings.port) == (Path("/srv/tink"), None, 8400)


def test_every_setting_is_read_from_its_variable():
    samples = {"str": "text", "int": "7", "float": "0.5", "bool": "true", "Switch": "true"}
    samples |= {"Path": "/a/folder", "Path | None": "/a/folder", "int | None": "7", "float | None": "0.5"}
    special = {"api_keys": "key=tenant", "log_level": "debug", "crash_at": "worker.body:2"}
    special |= {"vllm_base_url": "http://gpu-1:8000", "vllm_enable_lora": "false"}
    special["vllm_wait_seconds"] = "5"
    special["database_url"] = "postgresql+psycopg://somebody@here/tink"
    for field in fields(Settings):
        name = field.metadata["names"][0]
        default = getattr(load(), field.name)
        assert (
            getattr(load(**{name: special.get(field.name, samples[str(field.type)])}), field.name)
            != default
        )


def test_each_kind_is_kept_as_long_as_all_are_unless_it_has_a_time_of_its_own():
    hour = 3600.0
    assert load().kept == (168 * hour,) * 4
    assert load(TINK_RETENTION_HOURS="2").kept == (2 * hour,) * 4
    short = load(TINK_RETENTION_HOURS="inf", TINK_KEEP_REQUESTS_HOURS="0", TINK_KEEP_RESULTS_HOURS="5")
    assert short.kept == (0, 5 * hour, float("inf"), float("inf"))
    assert load(TINK_KEEP_ADAPTERS_HOURS="9").kept.adapters == 9 * hour


def test_none_but_requests_is_kept_for_less_than_an_hour():
    assert load(TINK_RETENTION_HOURS="0").kept == (0, 3600, 3600, 3600)


def test_an_unknown_tink_variable_is_named_with_the_closest_one():
    assert refusal(TINK_PROT="1") == ["TINK_PROT: there is no such setting; did you mean TINK_PORT?"]
    assert refusal(TINK_XYZZY="1") == ["TINK_XYZZY: there is no such setting"]
    assert load(XYZZY="1") == load()


def test_every_mistake_has_a_line_of_its_own():
    lines = refusal(TINK_PROT="1", TINK_PORT="many", USE_VLLM="perhaps", TINK_LORA_ALPHA="big")
    assert len(lines) == 4
    assert "TINK_PORT: 'many' is not a whole number" in lines
    assert "USE_VLLM: 'perhaps' is not true or false" in lines
    assert "TINK_LORA_ALPHA: 'big' is not a number" in lines


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TINK_PORT", "65536"),
        ("TINK_PORT", "-1"),
        ("PORT", "http"),
        ("MAX_WORKERS", "0"),
        ("MAX_WORKERS", "1.5"),
        ("VLLM_PORT", "0"),
        ("VLLM_PORT", "tcp://10.0.0.1:8000"),
        ("VLLM_GROUP_PORT", "65536"),
        ("VLLM_GROUP_PORT", "8000"),
        ("USE_HF", "maybe"),
        ("USE_MEGATRON", "2"),
        ("TINK_LOG_LEVEL", "loud"),
        ("TINK_TRAINER_THREADS", "few"),
        ("TINK_RETENTION_HOURS", "-1"),
        ("TINK_RETENTION_HOURS", "nan"),
        ("TINK_KEEP_REQUESTS_HOURS", "-1"),
        ("TINK_KEEP_RESULTS_HOURS", "nan"),
        ("TINK_KEEP_ADAPTERS_HOURS", "a week"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(name, value):
    (line,) = refusal(**{name: value})
    assert line.startswith((name, "TINK_PORT"))
    assert value in line


@pytest.mark.parametrize("keys", ["no-tenant", "=tenant", "key=", "key=tenant,oops"])
def test_a_bad_key_list_is_refused_without_showing_it(keys):
    (line,) = refusal(TINK_API_KEYS=keys)
    assert "KEY=TENANT" in line
    assert keys not in line


def test_a_key_belongs_to_its_tenant():
    settings = load(TINK_API_KEYS=" tml-a=alice , tml-b=bob,")
    assert settings.tenants == {"tml-a": "alice", "tml-b": "bob"}


def test_the_digest_tells_settings_apart_and_holds_no_key():
    assert load().digest == load().digest
    assert load().digest != load(MAX_WORKERS="2").digest
    assert load().digest == load(TINK_API_KEYS="tml-a=alice").digest


@pytest.mark.parametrize(
    ("host", "beyond"),
    [
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.1", True),
        ("trainer.example", True),
    ],
)
def test_loopback_is_told_from_the_rest(host, beyond):
    assert load(TINK_HOST=host).beyond_loopback is beyond


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "training on HuggingFace, sampling on HuggingFace"),
        ({"USE_HF": "false"}, "training on none, sampling on none"),
        ({"USE_MEGATRON": "true"}, "training on Megatron, sampling on Megatron"),
        ({"USE_VLLM": "1"}, "training on none, sampling on vLLM"),
        ({"USE_VLLM": "on", "USE_HF": "yes"}, "training on HuggingFace, sampling on vLLM"),
        ({"USE_VLLM": "true", "USE_MEGATRON": "true"}, "training on Megatron, sampling on vLLM"),
    ],
)
def test_the_mode_is_the_configuration_guides_table(environment, mode):
    assert load(**environment).routes.mode == mode


# -- the configuration guide's variables, at the place where each has its effect --------------------


def option(name):
    """What `tink vllm` gives to vLLM for it; None: it is not given."""

    def find(settings):
        words = [*vllm.command(settings), None]
        return words[words.index(name) + 1] if name in words else None

    return find


def vllm_environment(settings):
    before = {"VLLM_PORT": "8000", "VLLM_GROUP_PORT": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    return vllm.environment(settings, before).get("VLLM_PORT")


def embedded_slots(settings):
    words = embedded.command(settings, Home(Path("/home")))
    return words[words.index("--slots") + 1]


ON_MEGATRON, ON_VLLM = {"USE_MEGATRON": "true"}, {"USE_VLLM": "true"}


@pytest.mark.parametrize(
    ("name", "value", "look", "usual", "changed", "beside"),
    [
        ("USE_MEGATRON", "true", lambda s: s.routes.training, "hf", "megatron", {}),
        ("USE_MEGATRON", "true", lambda s: s.routes.sampling, "hf", "megatron", {}),
        ("USE_VLLM", "true", lambda s: s.routes.sampling, "hf", "vllm", {}),
        ("USE_VLLM", "true", lambda s: s.routes.training, "hf", None, {}),
        ("MAX_WORKERS", "2", lambda s: s.training_slots, 4, 2, {}),
        ("MAX_WORKERS", "2", embedded_slots, "4", "2", {}),
        ("MAX_WORKERS", "2", lambda s: s.training_slots, 1, 1, ON_MEGATRON),
        (
            "MEGATRON_SERVER_URL",
            "http://gpu-1:5001",
            lambda s: external(s).url,
            "http://127.0.0.1:5000",
            "http://gpu-1:5001",
            ON_MEGATRON,
        ),
        (
            "VLLM_BASE_URL",
            "http://gpu-1:8000,http://gpu-2:8000",
            lambda s: s.vllm_urls,
            ["http://127.0.0.1:8000"],
            ["http://gpu-1:8000", "http://gpu-2:8000"],
            ON_VLLM,
        ),
        ("VLLM_HOST", "gpu-1", lambda s: s.vllm_urls, ["http://127.0.0.1:8000"], ["http://gpu-1:8000"], {}),
        ("VLLM_HOST", "0.0.0.0", option("--host"), "127.0.0.1", "0.0.0.0", {}),
        ("VLLM_PORT", "9", lambda s: s.vllm_urls, ["http://127.0.0.1:8000"], ["http://127.0.0.1:9"], {}),
        ("VLLM_PORT", "9", option("--port"), "8000", "9", {}),
        ("VLLM_PORT", "9", vllm_environment, None, None, {}),
        ("VLLM_GROUP_PORT", "9100", vllm_environment, None, "9100", {}),
        ("VLLM_GROUP_PORT", "9100", option("--port"), "8000", "8000", {}),
        ("VLLM_GPU_MEMORY_UTIL", "0.5", option("--gpu-memory-utilization"), "0.2", "0.5", {}),
        ("VLLM_ENABLE_LORA", "false", option("--enable-lora"), "--max-loras", None, {}),
        ("VLLM_MAX_LORAS", "8", option("--max-loras"), "4", "8", {}),
        ("VLLM_MAX_LORAS", "8", option("--max-cpu-loras"), "32", "64", {}),
        ("VLLM_MAX_LORA_RANK", "128", option("--max-lora-rank"), "64", "128", {}),
    ],
)
def test_each_variable_of_the_guide_has_its_default_and_its_effect(
    name, value, look, usual, changed, beside
):
    beside = beside | {"TINK_HF_MODEL": "a/model"}
    assert look(load(**beside)) == usual
    assert look(load(**beside, **{name: value})) == changed


# -- tink serve -------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch, tmp_path):
    """The settings that `tink serve` would run with."""
    for field in fields(Settings):
        for name in field.metadata["names"]:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINK_HOME", str(tmp_path / "home"))
    seen = []
    monkeypatch.setattr(http_server, "run", lambda _serve, settings, *_: seen.append(settings))
    monkeypatch.setattr(serve.World, "listen", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(serve, "_raise_file_limit", lambda: None)
    return seen


def test_serve_beyond_loopback_needs_keys_or_a_plain_word(served, monkeypatch, capsys):
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "TINK_API_KEYS" in line
    assert "--no-auth" in line
    assert served == []
    assert main(["serve", "--host", "0.0.0.0", "--no-auth"]) == 0
    monkeypatch.setenv("TINK_API_KEYS", "tml-a=alice")
    assert main(["serve", "--host", "0.0.0.0"]) == 0
    assert [settings.host for settings in served] == ["0.0.0.0", "0.0.0.0"]


def test_serve_takes_options_before_variables(served, monkeypatch, tmp_path):
    monkeypatch.setenv("TINK_PORT", "2")
    assert main(["serve", "--port", "1", "--home", str(tmp_path / "other")]) == 0
    assert (served[0].port, served[0].home) == (1, tmp_path / "other")


def test_serve_prints_a_line_for_each_mistake(served, monkeypatch, capsys):
    monkeypatch.setenv("TINK_PROT", "1")
    monkeypatch.setenv("MAX_WORKERS", "many")
    assert main(["serve"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert all(line.startswith("tink serve: ") for line in err.splitlines())


def test_where_the_megatron_server_is_matters_only_if_it_is_used():
    assert Settings.load({"MEGATRON_SERVER_URL": "gpu-1"}).use_megatron is False
    with pytest.raises(StartupError, match="MEGATRON_SERVER_URL: 'gpu-1' is not where a server is"):
        Settings.load({"MEGATRON_SERVER_URL": "gpu-1", "USE_MEGATRON": "true"})
    assert Settings.load({"USE_MEGATRON": "true"}).megatron_server_url == "http://127.0.0.1:5000"


def test_vllm_servers_are_a_list_of_urls_or_the_one_of_host_and_port():
    assert load().vllm_urls == ["http://127.0.0.1:8000"]
    assert load(VLLM_HOST="0.0.0.0", VLLM_PORT="9000").vllm_urls == ["http://127.0.0.1:9000"]
    several = "http://gpu-1:8000/, https://gpu-2 ,http://gpu-1:8000"
    assert load(VLLM_BASE_URL=several).vllm_urls == ["http://gpu-1:8000", "https://gpu-2"]
    assert load(VLLM_HOST="::").vllm_urls == ["http://[::1]:8000"]
    assert load(VLLM_BASE_URL="http://[::1]:9000").vllm_urls == ["http://[::1]:9000"]
    wrongs = ["gpu-1:8000", "http://", "ftp://gpu-1", "http://user:word@gpu-1", "http://gpu-1:80a"]
    for wrong in [*wrongs, "http://gpu-1:99999", "http://gpu-1:8000/v1", "http://gpu-1?a=b"]:
        with pytest.raises(StartupError, match="VLLM_BASE_URL"):
            load(VLLM_BASE_URL=wrong)
