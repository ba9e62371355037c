"""A described dashboard as the JSON that Grafana reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from deploy.grafana.panels import HERE_MODEL, Dashboard, Kind, Panel, Row

RUNBOOKS = "http://localhost:9090/user/runbooks"
"""Where Prometheus serves docs/runbooks; a variable of every dashboard, so that it can be moved."""
TAG = "offramp"
WIDTH, HEIGHT = 24, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCHEMA = 39
STACKING = {Kind.STACK: "normal", Kind.SHARES: "percent"}


def render(dashboard: Dashboard) -> str:
    """The text of its file."""
    return json.dumps(_dashboard(dashboard), indent=1) + "\n"


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"offramp-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": SCHEMA,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "links": [
            {
                "title": "Dashboards",
                "type": "dashboards",
                "tags": [TAG],
                "includeVars": True,
                "keepTime": True,
            },
            {
                "title": "Runbooks",
                "type": "link",
                "icon": "doc",
                "url": "${runbooks}/README.md",
                "targetBlank": True,
            },
        ],
        "templating": {"list": _variables()},
        "panels": list(_panels(dashboard)),
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {"text": "Prometheus", "value": "prometheus"},
        },
        _variable("job", "label_values(offramp_build_info, job)"),
        # Models before instances: most series name no model, and are chosen by its servers.
        _variable("model", 'label_values(offramp_model_info{job=~"$job"}, model)'),
        _variable(
            "instance",
            'label_values(offramp_model_info{job=~"$job",model=~"$model"}, instance)',
        ),
        {
            **_variable("exit", f"label_values(offramp_answers_total{{{HERE_MODEL}}}, exit)"),
            "hide": 2,
        },
        {
            "name": "runbooks",
            "type": "constant",
            "query": RUNBOOKS,
            "current": {"text": RUNBOOKS, "value": RUNBOOKS},
            "hide": 2,
        },
    ]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "refresh": 2,
        "sort": 3,
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    y, number = 0, 1
    for row in dashboard.rows:
        yield _row(row, number, y)
        width = WIDTH // len(row.panels)
        for i, panel in enumerate(row.panels):
            place = {"x": i * width, "y": y + 1, "w": width, "h": HEIGHT}
            yield {"id": number + 1 + i, "gridPos": place, **_panel(panel)}
        number += 1 + len(row.panels)
        y += 1 + HEIGHT


def _row(row: Row, number: int, y: int) -> dict[str, Any]:
    repeat = {"repeat": row.repeat} if row.repeat else {}
    place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": place,
        "panels": [],
        **repeat,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    heat = panel.kind is Kind.HEAT
    return {
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "links": _runbook(panel),
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "format": "heatmap" if heat else "time_series",
            }
            for i, query in enumerate(panel.queries)
        ],
        **(_heat_map(panel) if heat else _time_series(panel)),
    }


def _runbook(panel: Panel) -> list[dict[str, Any]]:
    if panel.runbook is None:
        return []
    url = f"${{runbooks}}/{panel.runbook}.md"
    return [{"title": f"Runbook: {panel.runbook}", "url": url, "targetBlank": True}]


def _time_series(panel: Panel) -> dict[str, Any]:
    stacking = STACKING.get(panel.kind)
    custom: dict[str, Any] = {
        "drawStyle": "line",
        "lineInterpolation": "stepAfter" if panel.kind is Kind.STEPS else "linear",
        "lineWidth": 1,
        "fillOpacity": 60 if stacking else 8,
        "showPoints": "never",
        "stacking": {"mode": stacking or "none", "group": "A"},
    }
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
        custom["thresholdsStyle"] = {"mode": "dashed"}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": custom,
    }
    if panel.top is not None:
        defaults["max"] = panel.top
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _heat_map(panel: Panel) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Viridis", "steps": 64, "exponent": 0.5},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "le"},
            "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": True},
            "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
        },
    }
