"""What a running server's scheduler decides with."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from server.costs import CostTable

Row = dict[str, Any]


def engine(url: str, admin_token: str) -> Row:
    """As `GET /engine` gives it now."""
    request = urllib.request.Request(
        f"{url}/engine", headers={"Authorization": f"Bearer {admin_token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        said: Row = json.load(response)
    return said


def cost_table(said: Mapping[str, Any], times: float = 1.0) -> CostTable:
    """So many times what it expects of every stage and batch size."""
    seconds = said["seconds"].items()
    costs = CostTable(
        {int(stage): {int(n): times * s for n, s in row.items()} for stage, row in seconds}
    )
    for stage, share in said.get("teams", {}).items():
        costs.use_team(int(stage), share)
    return costs
