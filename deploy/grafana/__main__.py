"""The command line: python -m deploy.grafana writes the dashboards' JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.grafana.dashboard import render
from deploy.grafana.engine import ENGINE
from deploy.grafana.overview import OVERVIEW

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = (OVERVIEW, ENGINE)


def main(argv: list[str] | None = None) -> int:
    """Write every dashboard anew."""
    argparse.ArgumentParser(prog="python -m deploy.grafana", description=__doc__).parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        file = FOLDER / f"{dashboard.name}.json"
        file.write_text(render(dashboard))
        print(f"wrote {file.name}: {len(dashboard.panels)} panels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
