"""Save a dashboard as a view of a W&B project, and read back what is saved.

`wandb-workspaces` makes W&B's form of it; reading needs no package.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError
from ..redaction import redacted
from .dashboards import CONFIG, Dashboard, Panel, PanelKind, Section
from .wandb_server import OutOfReachError, Server, app_url

_KINDS: dict[str, PanelKind] = {
    "Run History Line Plot": "lines",
    "Bar Chart": "bars",
    "Weave": "table",
    "Parallel Coordinates Plot": "parallel",
    "Parameter Importance": "importance",
    "Scatter Plot": "scatter",
    "Run Comparer": "differences",
}
_VIEWS = """query SavedViews($project: String, $entity: String, $view: String) {
  viewer { id }
  project(name: $project, entityName: $entity) {
    allViews(viewType: "project-view", viewName: $view) { edges { node { id displayName spec } } }
  }
}"""
_VIEWER = "query ViewerEntity { viewer { entity } }"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A view that a project has."""

    id: str
    dashboard: Dashboard


def link(url: str, dashboard: Dashboard) -> str:
    """Return the address of a dashboard, saved or not, at the server *url*.

    Its entity is known.
    """
    return f"{app_url(url)}/{dashboard.entity}/{dashboard.project}?nw={dashboard.view}"


def with_entity(server: Server, dashboard: Dashboard) -> Dashboard:
    """Return *dashboard* with the team or user that it is saved for.

    It is its own, else that of the key.

    Raises:
        OutOfReachError: there is no route, or the key is refused.
    """
    if dashboard.entity is not None:
        return dashboard
    viewer = server.ask(_VIEWER, {}).get("viewer")
    if not viewer:
        raise OutOfReachError(f"{server.url} refuses the key")
    if not viewer.get("entity"):
        raise UsageError("W&B does not say which team or user the key belongs to; set tracking.entity=TEAM")
    return replace(dashboard, entity=viewer["entity"])


def find_saved(server: Server, dashboard: Dashboard) -> Saved | None:
    """Return the saved view of a dashboard whose entity is known, if there is one.

    Raises:
        OutOfReachError: there is no route, or the key is refused.
        UsageError: there is no such project.
    """
    given = {"project": dashboard.project, "entity": dashboard.entity, "view": _full_name(dashboard)}
    data = server.ask(_VIEWS, given)
    if not data.get("viewer"):
        raise OutOfReachError(f"{server.url} refuses the key")
    if data.get("project") is None:
        where = f"{dashboard.entity}/{dashboard.project}"
        raise UsageError(
            f"W&B has no project {where}, or not for this key; the first run that is shown makes it: "
            "submit one, or `sousbatch sync` what is recorded"
        )
    edges = ((data["project"].get("allViews") or {}).get("edges")) or []
    if not edges:
        return None
    node = edges[0]["node"]
    shown = replace(dashboard, name=node.get("displayName") or "", filter="", wanted="", group="", sections=())
    return Saved(id=node["id"], dashboard=read_spec(json.loads(node.get("spec") or "{}"), shown))


def push(server: Server, dashboard: Dashboard) -> str:
    """Save a dashboard in the place of an earlier one; return its address.

    Its entity is known.

    Raises:
        OutOfReachError, UsageError: as `find_saved`; or wandb-workspaces is not installed, or could not save it.
    """
    workspace = _workspace(dashboard)
    saved = find_saved(server, dashboard)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    workspace._internal_name, workspace._internal_id = _full_name(dashboard), saved.id if saved else ""
    try:
        with redirect_stderr(io.StringIO()):  # it prints a link that lacks a part of the address of W&B's own pages
            workspace.save()
    except Exception as error:  # it raises what its layers raise: a dozen kinds
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the dashboard could not be saved: {redacted(said)}") from error
    return link(server.url, dashboard)


def make_spec(dashboard: Dashboard) -> dict[str, Any]:
    """Return W&B's form of a dashboard, as it is saved.

    Raises:
        UsageError: wandb-workspaces is not installed.
    """
    model = _workspace(dashboard)._to_model()
    found: dict[str, Any] = model.spec.model_dump(by_alias=True, exclude_none=True)
    return found


def read_spec(spec: Mapping[str, Any], named: Dashboard) -> Dashboard:
    """Return the dashboard that W&B's form holds, as far as ours can.

    Its name and project are those of *named*.
    """
    shown = spec.get("section") or {}
    runs = (shown.get("runSets") or [{}])[0]
    filters = [one for one in (runs.get("filters") or {}).get("filters") or [] if not one.get("disabled")]
    keys = [_key(one.get("key") or {}) for one in filters]
    sections = (shown.get("panelBankConfig") or {}).get("sections") or []
    return replace(
        named,
        filter=" and ".join(keys),
        wanted=" and ".join(str(one.get("value")) for one in filters),
        group=" and ".join(map(_key, runs.get("grouping") or [])),
        sections=tuple(
            Section(name=str(one.get("name")), panels=tuple(_read_panel(panel) for panel in one.get("panels") or []))
            for one in sections
            if one.get("panels")  # W&B's pages add empty ones
        ),
    )


def _key(key: Mapping[str, Any]) -> str:
    return f"{key.get('section')}:{key.get('name')}"


def _read_panel(panel: Mapping[str, Any]) -> Panel:
    config, kind = panel.get("config") or {}, _KINDS.get(str(panel.get("viewType")), "other")
    found = Panel(kind=kind, title=config.get("chartTitle") or "")
    if kind in ("lines", "bars"):
        return replace(found, values=tuple(config.get("metrics") or ()), over=config.get("xAxis") or "")
    if kind == "table":
        return replace(found, values=(_table_name(config),))
    if kind == "parallel":
        return replace(found, values=tuple(_value(one.get("accessor")) for one in config.get("columns") or ()))
    if kind == "importance":
        return replace(found, values=(_value(config.get("targetKey")),))
    if kind == "scatter":
        return replace(found, values=(_value(config.get("yAxis")),), over=_value(config.get("xAxis")))
    return found if kind == "differences" else replace(found, values=(str(panel.get("viewType")),))


def _value(accessor: str | None) -> str:
    """Return what we call a column: W&B keeps the keys of a recipe below a `value`."""
    text = str(accessor or "").removeprefix("summary:")
    return text.replace(".value", "", 1) if text.startswith(CONFIG) else text


def _table_name(config: Mapping[str, Any]) -> str:
    """Return the name of the table that an expression picks from the summary of runs."""
    found: Any = config
    for name in ("panel2Config", "exp", "fromOp", "inputs", "key", "val"):
        found = found.get(name) if isinstance(found, dict) else None
    return str(found or "")


def _full_name(dashboard: Dashboard) -> str:
    return f"nw-{dashboard.view}-v"


def _workspace(dashboard: Dashboard) -> Any:
    try:
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        is_missing = str(error.name).startswith("wandb_workspaces")
        missing = "wandb-workspaces, which is not installed" if is_missing else str(error)
        raise UsageError(f"saving a dashboard needs {missing}: pip install 'sousbatch[dashboards]'") from None

    def named(text: str) -> Any:
        section, _, name = text.partition(":")
        return expr.Config(name) if f"{section}:" == CONFIG else expr.Metric(name.capitalize())

    sections = [
        ws.Section(name=one.name, is_open=True, panels=[_panel(panel) for panel in one.panels])
        for one in dashboard.sections
    ]
    runs = ws.RunsetSettings(
        filters=expr.And(named(dashboard.filter) == dashboard.wanted),
        groupby=[named(dashboard.group)] if dashboard.group else [],
    )
    return ws.Workspace(
        entity=dashboard.entity or "",
        project=dashboard.project,
        name=dashboard.name,
        sections=sections,
        runset_settings=runs,
    )


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    def named(text: str) -> Any:
        return wr.Config(text.removeprefix(CONFIG)) if text.startswith(CONFIG) else wr.SummaryMetric(text)

    if panel.kind == "lines":
        return wr.LinePlot(title=panel.title, x=panel.over, y=list(panel.values))
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.values))
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.values[0])
    if panel.kind == "parallel":
        columns = [wr.ParallelCoordinatesPlotColumn(metric=named(value)) for value in panel.values]
        return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)
    if panel.kind == "importance":
        return wr.ParameterImportancePlot(with_respect_to=panel.values[0])
    if panel.kind == "scatter":
        return wr.ScatterPlot(title=panel.title, x=named(panel.over), y=named(panel.values[0]))
    return wr.RunComparer(diff_only="split")
