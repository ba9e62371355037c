"""Everything an operator can set, in one class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from model.cores import usable_cores

PREFIX = "OFFRAMP_"
DAY_SECONDS = 86_400.0
MOST_PIXELS = 178_956_970
"""Pillow opens no image of more."""


class SettingsError(Exception):
    """Settings that cannot be used; the message names each one and its fault."""


def _sendable(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not (text.isascii() and text.isprintable()):
        raise ValueError(
            "must be of printable ASCII: clients differ in how they send anything else"
        )
    return secret


Secret = Annotated[SecretStr, AfterValidator(_sendable)]


class Settings(BaseSettings):
    """Command-line flag over environment (`OFFRAMP_…`) over default."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_parse_none_str="none",
        cli_prog_name="python -m server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_parse_none_str="none",
        cli_avoid_json=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    bundle: Path = Field(Path("model/default"), description="folder of the bundle to serve")
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="where the network runs; auto takes CUDA where there is a card"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="numerics of the network; on CUDA auto takes float16, or bfloat16 if of the "
        "two the policy was certified in bfloat16 alone; on CPU the faster of float32 and, where "
        "the policy was certified in it, bfloat16; int8, for CPU, is taken only if asked for, and "
        "only with a policy that was calibrated for it",
    )
    compile: Literal["auto", "off", "require"] = Field(
        "auto",
        description="compiled stages on CPU, CUDA graphs on a card; auto does without until they "
        "are ready, or if they fail; require takes no request before",
    )
    cache_dir: Path = Field(
        Path("~/.cache/offramp"), description="where compiled stages are kept from start to start"
    )
    threads: int = Field(1, ge=1, le=1024, description="threads inside one operation on CPU")
    workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="stage batches that run at the same time on CPU, each with THREADS; 0 for as "
        "many as the cores that the process may use, or all but one where HTTP needs it more; an "
        "image that is alone has the threads of all",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    max_accuracy_loss: float = Field(
        0.01, ge=0, le=1, description="operating point in peace: accuracy it may lose, as a share"
    )
    overload_accuracy_loss: float = Field(
        0.05, ge=0, le=1, description="how far overload may move the operating point"
    )
    overload_first_exit: bool = Field(
        True, description="whether overload may go on to first-exit answers, without a bound"
    )
    default_deadline_ms: float | None = Field(
        1000.0,
        gt=0,
        le=DAY_SECONDS * 1e3,
        description="deadline of requests that name none; none for no deadline",
    )
    max_batch: int = Field(32, ge=1, le=1024, description="most images in one stage batch")
    max_queue: int = Field(1024, ge=1, description="most images accepted and not yet answered")
    max_body_bytes: int = Field(16 * 2**20, ge=1, description="most bytes of a request body")
    max_bodies_bytes: int = Field(
        256 * 2**20,
        validate_default=True,
        description="most bytes of request bodies in memory, all together; what would be more is "
        "refused",
    )
    max_pixels: int = Field(
        50_000_000,
        ge=1,
        le=MOST_PIXELS,
        description="most pixels an image may announce; a WebP half as many",
    )
    decode_threads: int = Field(2, ge=1, le=256, description="threads that decode large images")
    audit_rate: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the policy's early answers run to the last exit in idle time",
    )
    api_keys: Annotated[tuple[Secret, ...], NoDecode] = Field(
        (), description="comma-separated keys that clients must send; empty for none"
    )
    admin_token: Secret | None = Field(
        None,
        description="bearer token of PUT /policy and GET /engine, which are not routed without one",
    )
    drain_notice_seconds: float = Field(
        0.0,
        ge=0,
        le=DAY_SECONDS,
        description="how long, on shutdown, requests are still taken while /readyz says 503, so "
        "that a balancer stops sending them",
    )
    drain_seconds: float = Field(
        10.0,
        ge=0,
        le=DAY_SECONDS,
        description="how long accepted requests may take to finish on shutdown",
    )
    log_format: Literal["text", "json"] = Field("text", description="shape of a log line")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )

    @property
    def default_deadline_seconds(self) -> float | None:
        """Of requests that name none, if they have one."""
        return None if self.default_deadline_ms is None else self.default_deadline_ms / 1e3

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value or ()
        if value.lstrip().startswith("["):
            raise ValueError("must be keys with commas between them, and no JSON")
        keys = tuple(key.strip() for key in value.split(",") if key.strip())
        if value and not keys:
            raise ValueError("holds no key, so nobody would need one")
        return keys

    @field_validator("bundle", "cache_dir", mode="before")
    @classmethod
    def _name_a_folder(cls, value: object) -> object:
        if value == "":
            raise ValueError("must name a folder")
        return value

    @field_validator("max_bodies_bytes")
    @classmethod
    def _hold_one(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("max_body_bytes", 0):
            raise ValueError("must not be less than MAX_BODY_BYTES")
        return value

    @field_validator("admin_token", mode="before")
    @classmethod
    def _strip(cls, value: object) -> object:
        return (value.strip() or None) if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment; no file is read behind the operator's back."""
        return init_settings, env_settings


def workers_at_once(asked: int, threads: int, cores: int | None = None) -> tuple[int, int]:
    """Fewest and most stage batches at the same time on CPU: with and without a core for HTTP.

    Args:
        asked: the setting; 0 leaves it open.
        threads: inside one operation of each.
        cores: by default, those that this process may use.
    """
    cores = cores or usable_cores()
    if asked:
        return asked, asked
    return max(1, (cores - 1) // threads), max(1, cores // threads)


def load_settings(argv: Sequence[str]) -> Settings:
    """Read the command line and the environment.

    Raises:
        SettingsError: an unknown `OFFRAMP_` name or a bad value.
        SystemExit: `--help` was asked for, or a flag is unknown.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    unknown = sorted(n for n in os.environ if n.upper().startswith(PREFIX) and n not in known)
    if any(name.endswith("_SERVICE_HOST") for name in unknown):
        raise SettingsError(
            f"Kubernetes sets {', '.join(unknown)} for a Service called as the settings are; "
            "set enableServiceLinks: false in the pod's spec"
        )
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}; see python -m server --help")
    command_line: CliSettingsSource[Settings] = CliSettingsSource(
        Settings, cli_parse_args=list(argv)
    )
    try:
        return Settings(_cli_settings_source=command_line)
    except ValidationError as error:
        faults = [
            f"{_name(e['loc'])}: {_said(e['msg'])}" for e in error.errors(include_input=False)
        ]
        raise SettingsError("; ".join(faults)) from None


def _said(message: str) -> str:
    return message.removeprefix("Value error, ")


def _name(location: tuple[int | str, ...]) -> str:
    return f"{PREFIX}{str(location[0]).upper()}" if location else "settings"
