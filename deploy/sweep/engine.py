"""What a running server's scheduler decides with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError, URLError

from deploy.reply import reply
from server.costs import CostTable
from server.protocol import EngineBody

Row = dict[str, Any]


def engine(url: str, admin_token: str) -> Row:
    """As `GET /engine` gives it now.

    Raises:
        OSError: it does not; the message says what a person can do about it.
    """
    try:
        body = reply(f"{url}/engine", {"Authorization": f"Bearer {admin_token}"})
    except HTTPError as error:
        error.close()  # it is the response, too
        said = f"{url}/engine answers {error.code}; is it the server's admin token?"
        raise OSError(said) from None
    except URLError as error:
        raise OSError(f"{url} gives no answer: {error.reason}") from None
    except OSError as error:
        raise OSError(f"{url} gives no answer: {error}") from None
    try:
        decides: Row = json.loads(body)
        EngineBody.model_validate(decides)
    except ValueError:
        raise OSError(f"{url}/engine answers what no Offramp does") from None
    return decides


def cost_table(said: Mapping[str, Any], times: float = 1.0) -> CostTable:
    """So many times what it expects of every stage and batch size."""
    seconds = said["seconds"].items()
    costs = CostTable(
        {int(stage): {int(n): times * s for n, s in row.items()} for stage, row in seconds}
    )
    for stage, share in said.get("teams", {}).items():
        costs.use_team(int(stage), share)
    return costs


def workers_of(said: Mapping[str, Any]) -> int:
    """How many workers there are at most; an older server names those at work, or none."""
    most: int = said.get("most_workers") or said.get("workers", 1)
    return most
