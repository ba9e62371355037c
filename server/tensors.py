"""Tensors of the Open Inference Protocol, V2: in JSON, and in its binary extension."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import to_json

from server.errors import BadRequest
from server.protocol import ROUNDING

Body = TypeVar("Body", bound=BaseModel)

HEADER_LENGTH = "Inference-Header-Content-Length"
"""How many bytes of a body are JSON, where raw tensors follow."""
MOST_JSON_BYTES = 2**20
"""Read in the event loop; more of anything goes as raw bytes."""
MOST_JSON_NUMBERS = 2**16
"""Of a tensor, for the same reason."""
MOST_DIMENSIONS = 8
MOST_IN_A_DIMENSION = 2**31 - 1
LENGTH_BYTES = 4
"""Before each element of a raw tensor of bytes; little-endian, as all numbers there."""
DATATYPES = {"FP32": "<f4", "INT32": "<i4", "BOOL": "?"}
"""Of numbers, as numpy has them."""


class Message(BaseModel):
    """JSON of the protocol. In it null is as good as absent: some clients write every field."""

    @model_validator(mode="before")
    @classmethod
    def _of_what_is_there(cls, said: Any) -> Any:
        return _without_nulls(said)


class Sent(Message):
    """One input, as its JSON says."""

    name: str
    datatype: Literal["BYTES", "UINT8"]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MOST_IN_A_DIMENSION)], ...],
        Field(max_length=MOST_DIMENSIONS),
    ]
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field({})

    @property
    def size(self) -> int:
        """How many elements its shape has room for."""
        return math.prod(self.shape)


class Wanted(Message):
    """One output that is asked for."""

    name: str
    parameters: dict[str, Any] = Field({})


class InferenceRequest(Message):
    """The JSON of a request; what the protocol may know of besides is left alone."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = Field(None, max_length=128, description="given back as it came")
    parameters: dict[str, Any] = Field({})
    inputs: tuple[Sent, ...] = Field(min_length=1)
    outputs: tuple[Wanted, ...] = Field(())

    @field_validator("outputs")
    @classmethod
    def _each_once(cls, outputs: tuple[Wanted, ...]) -> tuple[Wanted, ...]:
        """Or a short request would have an endless response."""
        if len({one.name for one in outputs}) < len(outputs):
            raise ValueError("an output is asked for twice")
        return outputs

    def wants_binary(self, output: Wanted) -> bool:
        """Whether this output is to be raw."""
        usual = self.parameters.get("binary_data_output", False)
        return output.parameters.get("binary_data", usual) is True


def _without_nulls(said: Any) -> Any:
    """Names without a value left out; what lists hold stays."""
    if not isinstance(said, dict):
        return said
    return {name: _without_nulls(one) for name, one in said.items() if one is not None}


def read_request(body: bytes, header_length: str | None) -> tuple[InferenceRequest, bytes]:
    """A request's JSON, and the raw tensors behind it.

    Args:
        body: the whole.
        header_length: what the header of that name says, if there is one.

    Raises:
        BadRequest: it is malformed.
    """
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 20):
            raise BadRequest(f"{HEADER_LENGTH} must be a number of bytes")
        length = int(header_length)
    if length > len(body):
        raise BadRequest(f"{HEADER_LENGTH} is {length}, and the body has {len(body)} bytes")
    if length > MOST_JSON_BYTES:
        raise BadRequest(f"the JSON is over {MOST_JSON_BYTES} bytes; send tensors as raw bytes")
    return parsed(InferenceRequest, body[:length]), body[length:]


def parsed(kind: type[Body], data: bytes) -> Body:
    """JSON of a kind.

    Raises:
        BadRequest: it is malformed.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON"
        raise BadRequest(f"{where[:100]}: {first['msg']}") from None


def elements_of(sent: Sent, raw: bytes) -> list[bytes]:
    """A BYTES input's elements; as JSON has no bytes, they are in base64 there.

    Raises:
        BadRequest: they are malformed, or not as many as the shape says.
    """
    found = _raw_elements(raw) if sent.data is None else [_decoded(x, sent.name) for x in sent.data]
    if len(found) != sent.size:
        raise BadRequest(f"{sent.name}: {len(found)} elements, and the shape has {sent.size}")
    return found


def array_of(sent: Sent, raw: bytes) -> np.ndarray:
    """A UINT8 input of its shape.

    Raises:
        BadRequest: an element is no such number, or there are not as many as the shape says.
    """
    flat = np.frombuffer(raw, np.uint8) if sent.data is None else _bytes_of(sent, sent.data)
    if flat.size != sent.size:
        raise BadRequest(f"{sent.name}: {flat.size} elements, and the shape has {sent.size}")
    try:
        return flat.reshape(sent.shape)
    except ValueError:  # it is empty, and otherwise too large
        raise BadRequest(f"{sent.name}: no tensor may have the shape {sent.shape}") from None


def check_raw(sent: Sent, raw: bytes) -> None:
    """Raise BadRequest unless the raw bytes of a request are those of its only input."""
    said = sent.parameters.get("binary_data_size")
    if said is not None and type(said) is not int:
        raise BadRequest(f"{sent.name}: binary_data_size must be a number of bytes")
    if sent.data is None and said is None:
        raise BadRequest(f"{sent.name}: it has neither data nor binary_data_size")
    if sent.data is not None and said is not None:
        raise BadRequest(f"{sent.name}: it has both data and binary_data_size")
    if len(raw) != (said or 0):
        raise BadRequest(f"{len(raw)} raw bytes follow the JSON, and {said or 0} were announced")


def written(
    name: str, datatype: str, values: np.ndarray | Sequence[str], binary: bool
) -> tuple[dict[str, Any], bytes]:
    """One output's JSON, and its raw bytes, which are empty where JSON holds its values.

    Args:
        name: the output's.
        datatype: of the protocol.
        values: `[N, …]`, or N strings.
        binary: whether it is to be raw.
    """
    shape = list(values.shape) if isinstance(values, np.ndarray) else [len(values)]
    said: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if not binary:
        return {**said, "data": _in_json(values)}, b""
    if isinstance(values, np.ndarray):
        raw = values.astype(DATATYPES[datatype]).tobytes()
    else:
        raw = b"".join(_with_length(value.encode()) for value in values)
    return {**said, "parameters": {"binary_data_size": len(raw)}}, raw


def write_response(
    said: dict[str, Any], outputs: Sequence[tuple[dict[str, Any], bytes]]
) -> tuple[bytes, int | None]:
    """A response's body, and how much of it is JSON where raw tensors follow.

    Args:
        said: beside the outputs.
        outputs: as `written` gives them.
    """
    header = to_json({**said, "outputs": [output for output, _ in outputs]})
    raw = b"".join(raw for _, raw in outputs)
    return header + raw, len(header) if any("parameters" in o for o, _ in outputs) else None


def _in_json(values: np.ndarray | Sequence[str]) -> list[Any]:
    if not isinstance(values, np.ndarray):
        return list(values)
    if values.dtype.kind == "f":
        values = values.astype(float).round(ROUNDING)
    flat: list[Any] = values.reshape(-1).tolist()
    return flat


def _raw_elements(raw: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(raw):
        start = at + LENGTH_BYTES
        if start > len(raw):
            raise BadRequest("the raw bytes end amid an element's length")
        at = start + int.from_bytes(raw[at:start], "little")
        if at > len(raw):
            raise BadRequest("the raw bytes end amid an element")
        found.append(raw[start:at])
    return found


def _with_length(data: bytes) -> bytes:
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def _bytes_of(sent: Sent, data: list[Any]) -> np.ndarray:
    if sent.size > MOST_JSON_NUMBERS:
        raise BadRequest(f"{sent.name}: more than {MOST_JSON_NUMBERS} numbers must come raw")
    numbers = list(islice(_leaves(data), MOST_JSON_NUMBERS + 1))
    if len(numbers) > MOST_JSON_NUMBERS:
        raise BadRequest(f"{sent.name}: more than {MOST_JSON_NUMBERS} numbers must come raw")
    if not all(type(number) is int and 0 <= number <= 255 for number in numbers):
        raise BadRequest(f"{sent.name}: its data must be whole numbers from 0 to 255")
    try:
        return np.array(data, np.uint8).reshape(-1)
    except ValueError:
        raise BadRequest(f"{sent.name}: its data are lists of several lengths") from None


def _leaves(data: Any) -> Iterator[Any]:
    """What lists hold, which may hold lists. Before numpy sees it, which would give every element
    the room of the longest."""
    if isinstance(data, list):
        for each in data:
            yield from _leaves(each)
    else:
        yield data


def _decoded(text: Any, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise BadRequest(f"{name}: as JSON its elements are strings in base64") from None
