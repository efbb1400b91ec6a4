"""Every setting: its environment variable, its default and what it does. `Settings.load` reads them for the
worker and the commands; a training server reads its own three (trainer/options.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from tink import crash
from tink.addresses import NO_DATABASE_URL, is_database_url, is_loopback, is_origin, url_of
from tink.domain.retention import Kept
from tink.domain.routing import Routes, routes
from tink.errors import StartupError, suggestion
from tink.home import Home

Switch = Literal["auto", "true", "false"]


def _setting(
    default: Any,
    names: str,
    help: str,  # noqa: A002  as argparse says it
    *,
    secret: bool = False,
    otherwise: str = "none",
) -> Any:
    """`names`: the environment variables that set it, the first one that is there wins. `otherwise`: what
    holds where it is empty, which is the default then."""
    metadata = {"names": tuple(names.split()), "help": help, "secret": secret, "otherwise": otherwise}
    return dataclass_field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    host: str = _setting("127.0.0.1", "TINK_HOST", "address to listen on")
    port: int = _setting(8400, "TINK_PORT PORT", "port to listen on; 0 takes a free one")
    home: Path = _setting(
        Path("~/.tink"), "TINK_HOME", "folder of the journal, models and artifacts; a local disk"
    )
    database_url: str = _setting(
        "",
        "TINK_DATABASE_URL",
        "the journal's database, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
        secret=True,
        otherwise="SQLite files in the home",
    )
    artifacts: Path | None = _setting(
        None, "TINK_ARTIFACTS", "folder of checkpoints and adapters", otherwise="artifacts under the home"
    )
    api_keys: str = _setting(
        "", "TINK_API_KEYS", "keys clients may use: KEY=TENANT, comma-separated", secret=True
    )
    log_level: str = _setting("info", "TINK_LOG_LEVEL", "debug, info, warning or error")
    hf_model: str = _setting(
        "",
        "TINK_HF_MODEL",
        "model directory or hub id, for the engine or a plain server",
        otherwise="a tiny one",
    )
    hf_model_name: str = _setting(
        "", "TINK_HF_MODEL_NAME", "the name that clients use for it", otherwise="what TINK_HF_MODEL says"
    )
    lora_alpha: float = _setting(
        32.0, "TINK_LORA_ALPHA", "alpha of every new adapter; the scale is alpha/rank"
    )
    trainer_threads: int = _setting(
        1, "TINK_TRAINER_THREADS", "CPU threads of one training job; part of what makes a redo exact"
    )
    trainer_orphan_seconds: int = _setting(
        600, "TINK_TRAINER_ORPHAN_SECONDS", "the embedded trainer ends after so long without a worker"
    )
    use_hf: Switch = _setting("auto", "USE_HF", "HuggingFace engine: auto is on when both others are off")
    use_megatron: bool = _setting(
        False, "USE_MEGATRON", "train on a server of its own (`tink trainer`), one job at a time"
    )
    megatron_server_url: str = _setting(
        "http://127.0.0.1:5000", "MEGATRON_SERVER_URL", "where that server is"
    )
    trainer_token: str = _setting(
        "",
        "TINK_TRAINER_TOKEN",
        "what its callers must carry; the same for `tink serve` and `tink trainer`",
        secret=True,
    )
    use_vllm: bool = _setting(False, "USE_VLLM", "sample on vLLM")
    vllm_base_url: str = _setting(
        "", "VLLM_BASE_URL", "vLLM servers, comma-separated", otherwise="http://VLLM_HOST:VLLM_PORT"
    )
    vllm_host: str = _setting(
        "127.0.0.1", "VLLM_HOST", "where vLLM listens; 0.0.0.0 is dialled as 127.0.0.1"
    )
    vllm_port: int = _setting(8000, "VLLM_PORT", "the port of vLLM")
    vllm_group_port: int | None = _setting(
        None,
        "VLLM_GROUP_PORT",
        "for `tink vllm`: the first port where vLLM's processes meet",
        otherwise="free ones",
    )
    vllm_api_key: str = _setting("", "VLLM_API_KEY", "the key that vLLM wants (--api-key)", secret=True)
    vllm_gpu_memory_util: float = _setting(
        0.2, "VLLM_GPU_MEMORY_UTIL", "for `tink vllm`: the part of the GPU's memory that vLLM takes"
    )
    vllm_enable_lora: bool = _setting(True, "VLLM_ENABLE_LORA", "for `tink vllm`: serve adapters")
    vllm_max_loras: int = _setting(4, "VLLM_MAX_LORAS", "for `tink vllm`: adapters in one batch")
    vllm_max_lora_rank: int = _setting(64, "VLLM_MAX_LORA_RANK", "for `tink vllm`: the highest rank")
    vllm_wait_seconds: float = _setting(
        600.0, "TINK_VLLM_WAIT_SECONDS", "how long a job waits for a vLLM server before it fails"
    )
    max_workers: int = _setting(
        4, "MAX_WORKERS", "different adapters that the HuggingFace engine trains at once"
    )
    snapshot_seconds: float = _setting(
        30.0, "TINK_SNAPSHOT_SECONDS", "a model is snapshotted when its redo would take so long"
    )
    retention_hours: float = _setting(
        168.0,
        "TINK_RETENTION_HOURS",
        "how long requests, results and weights that are sampled no more stay; inf is for ever",
    )
    keep_requests_hours: float | None = _setting(
        None,
        "TINK_KEEP_REQUESTS_HOURS",
        "of these the requests: what a replay of covered operations needs, and no redo does",
        otherwise="TINK_RETENTION_HOURS",
    )
    keep_results_hours: float | None = _setting(
        None,
        "TINK_KEEP_RESULTS_HOURS",
        "of these the results: what a client can fetch again; an hour at least",
        otherwise="TINK_RETENTION_HOURS",
    )
    keep_adapters_hours: float | None = _setting(
        None,
        "TINK_KEEP_ADAPTERS_HOURS",
        "of these the weights that are sampled no more; an hour at least",
        otherwise="TINK_RETENTION_HOURS",
    )
    hang_seconds: float = _setting(
        1800.0,
        "TINK_HANG_SECONDS",
        "a trainer whose operation makes no progress for so long is ended; 0: never",
    )
    max_attempts: int = _setting(
        3, "TINK_MAX_ATTEMPTS", "how often a job is sent to a backend that dies of it before it fails"
    )
    crash_at: str = _setting(
        "", "TINK_CRASH_AT", "for tests: NAME[:N], the process kills itself the N-th time at that point"
    )

    @property
    def routes(self) -> Routes:
        hf = self.use_hf == "true" or (
            self.use_hf == "auto" and not self.use_megatron and not self.use_vllm
        )
        return routes(megatron=self.use_megatron, vllm=self.use_vllm, hf=hf)

    @property
    def training_slots(self) -> int:
        """Training jobs that run at once. Two of one adapter never do."""
        return self.max_workers if self.routes.training == "hf" else 1

    @property
    def kept(self) -> Kept:
        """For how long what nothing needs stays."""
        own = self.keep_requests_hours, self.keep_results_hours, self.keep_adapters_hours, None
        return Kept.asked(*(3600 * (self.retention_hours if hours is None else hours) for hours in own))

    @property
    def vllm_urls(self) -> list[str]:
        """Where vLLM servers are. Raises StartupError for what is no URL."""
        anywhere = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104  dialled, not bound
        host = anywhere.get(self.vllm_host, self.vllm_host)
        found = [url.strip().rstrip("/") for url in self.vllm_base_url.split(",") if url.strip()]
        for url in found:
            if not is_origin(url):
                raise StartupError(
                    f"VLLM_BASE_URL: {url!r} is not where a server is, such as http://127.0.0.1:8000 "
                    "(without /v1 or any other path)"
                )
        return list(dict.fromkeys(found)) or [url_of(host, self.vllm_port)]

    @property
    def home_folder(self) -> Home:
        return Home(self.home, self.database_url)

    @property
    def artifact_root(self) -> Path:
        return self.artifacts or self.home_folder.artifacts

    @property
    def tenants(self) -> dict[str, str]:
        """API key -> tenant."""
        found = {}
        for pair in self.api_keys.split(","):
            key, _, tenant = pair.strip().partition("=")
            if not pair.strip():
                continue
            if not key or not tenant.strip():
                raise StartupError("TINK_API_KEYS: each entry must be KEY=TENANT, comma-separated")
            found[key] = tenant.strip()
        return found

    @property
    def digest(self) -> str:
        """Identifies the settings in the journal, without secrets."""
        public = {f.name: str(getattr(self, f.name)) for f in fields(self) if not f.metadata["secret"]}
        return hashlib.sha256(msgspec.json.encode(public, order="sorted")).hexdigest()[:16]

    @property
    def beyond_loopback(self) -> bool:
        return not is_loopback(self.host)

    @classmethod
    def load(
        cls, environment: Mapping[str, str], *, only: Collection[str] | None = None, **arguments: Any
    ) -> Settings:
        """From the environment; `arguments` that are not None win. Raises StartupError with one line for
        each unknown TINK_ name and each value that cannot work. `only`: the variables that matter to a
        caller to whom not all do; none of the others can be wrong."""
        if only is not None:
            environment = {name: value for name, value in environment.items() if name in only}
        reading = cls.read(environment, **arguments)
        if reading.problems:
            raise StartupError("\n".join(reading.problems))
        return reading.settings

    @classmethod
    def read(cls, environment: Mapping[str, str], **arguments: Any) -> Reading:
        """The same, with what is wrong, and without an error."""
        known = {name for f in fields(cls) for name in f.metadata["names"]}
        problems = [
            f"{name}: there is no such setting" + suggestion(name, known)
            for name in sorted(environment)
            if name.startswith("TINK_") and name not in known and name not in OTHERS
        ]
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for f in fields(cls):
            name = next((n for n in f.metadata["names"] if environment.get(n, "") != ""), None)
            if arguments.get(f.name) is not None:
                values[f.name], sources[f.name] = arguments[f.name], f"--{f.name}"
            elif name is not None:
                try:
                    values[f.name], sources[f.name] = _PARSERS[str(f.type)](environment[name]), name
                except ValueError as error:
                    shown = "" if f.metadata["secret"] else f" {environment[name]!r}"
                    problems.append(f"{name}:{shown} {error}")
        settings = cls(**values)._with_absolute_paths()
        return Reading(settings, sources, [*problems, *settings._problems()])

    def _with_absolute_paths(self) -> Settings:
        hf_model = self.hf_model
        if hf_model.startswith(("/", ".", "~")) or (Path(hf_model).is_dir() and hf_model):
            hf_model = str(Path(hf_model).expanduser().absolute())
        paths: dict[str, Any] = {"home": self.home.expanduser().absolute(), "hf_model": hf_model}
        if self.artifacts is not None:
            paths["artifacts"] = self.artifacts.expanduser().absolute()
        return replace(self, **paths)

    def _problems(self) -> Iterator[str]:
        """Values that cannot work, a line each."""
        if not 0 <= self.port < 65536:
            yield f"TINK_PORT: {self.port} is not a port (0 to 65535)"
        for name, port in (("VLLM_PORT", self.vllm_port), ("VLLM_GROUP_PORT", self.vllm_group_port)):
            if port is not None and not 0 < port < 65536:
                yield f"{name}: {port} is not a port (1 to 65535)"
        if self.vllm_group_port == self.vllm_port:
            yield f"VLLM_GROUP_PORT: {self.vllm_group_port} is where vLLM listens (VLLM_PORT): take another"
        least = {
            "MAX_WORKERS": (self.max_workers, 1),
            "TINK_MAX_ATTEMPTS": (self.max_attempts, 1),
            "TINK_TRAINER_THREADS": (self.trainer_threads, 1),
            "TINK_TRAINER_ORPHAN_SECONDS": (self.trainer_orphan_seconds, 0),
            "TINK_SNAPSHOT_SECONDS": (self.snapshot_seconds, 0.0),
            "TINK_RETENTION_HOURS": (self.retention_hours, 0.0),
            "TINK_HANG_SECONDS": (self.hang_seconds, 0.0),
            "VLLM_MAX_LORAS": (self.vllm_max_loras, 1),
            "VLLM_MAX_LORA_RANK": (self.vllm_max_lora_rank, 1),
            "TINK_VLLM_WAIT_SECONDS": (self.vllm_wait_seconds, 1.0),
        }
        kept = {
            "TINK_KEEP_REQUESTS_HOURS": self.keep_requests_hours,
            "TINK_KEEP_RESULTS_HOURS": self.keep_results_hours,
            "TINK_KEEP_ADAPTERS_HOURS": self.keep_adapters_hours,
        }
        least |= {name: (hours, 0.0) for name, hours in kept.items() if hours is not None}
        for name, (value, bound) in least.items():
            if not value >= bound:
                yield f"{name}: {value} must be at least {bound}"
        if not 0 < self.vllm_gpu_memory_util <= 1:
            yield f"VLLM_GPU_MEMORY_UTIL: {self.vllm_gpu_memory_util} is not above 0 and up to 1"
        if self.use_megatron and not is_origin(self.megatron_server_url):
            yield (
                f"MEGATRON_SERVER_URL: {self.megatron_server_url!r} is not where a server is, such as "
                "http://127.0.0.1:5000"
            )
        if not 0 < self.lora_alpha < float("inf"):
            yield f"TINK_LORA_ALPHA: {self.lora_alpha} must be above 0"
        if self.database_url and not is_database_url(self.database_url):
            yield f"TINK_DATABASE_URL: {NO_DATABASE_URL}"
        if self.log_level not in {"debug", "info", "warning", "error"}:
            yield f"TINK_LOG_LEVEL: {self.log_level!r} is not debug, info, warning or error"
        if self.hf_model.startswith("/") and not Path(self.hf_model).is_dir():
            yield f"TINK_HF_MODEL: there is no directory {self.hf_model}"
        looks: list[Callable[[], object]] = [lambda: self.tenants, lambda: self.vllm_urls]
        if self.crash_at:
            looks.append(lambda: crash.parse(self.crash_at))
        for look in looks:
            try:
                look()
            except StartupError as error:
                yield str(error)


class Reading(NamedTuple):
    """`settings`: with defaults where a value could not be read. `sources`: by field, the variable or
    option that set it. `problems`: a line each."""

    settings: Settings
    sources: Mapping[str, str]
    problems: list[str]


# Read by the tests.
OTHERS = frozenset({"TINK_TEST_VLLM"})


def _switch(text: str) -> str:
    if text.lower() == "auto":
        return "auto"
    return "true" if _boolean(text) else "false"


def _boolean(text: str) -> bool:
    match text.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise ValueError("is not true or false")


def _number(kind: Callable[[str], Any], word: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"is not {word}") from None

    return parse


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _number(int, "a whole number"),
    "int | None": _number(int, "a whole number"),
    "float": _number(float, "a number"),
    "float | None": _number(float, "a number"),
    "bool": _boolean,
    "Switch": _switch,
    "Path": Path,
    "Path | None": Path,
}
