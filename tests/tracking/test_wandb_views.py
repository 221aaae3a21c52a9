"""A dashboard is saved as one view of a W&B project, however often, and read back as what it was."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.tracking.dashboards import Dashboard, Panel, Section, compare
from sousbatch.tracking.wandb_server import Server, app_url, find_server
from sousbatch.tracking.wandb_views import find_saved, link, make_spec, push, read_spec, with_entity

from .stand_in import Run, StandIn

GOLDEN = Path(__file__).with_name("golden.view.json")
SCORE, RATE = "score/model/cer", "config:train.learning_rate"
PANELS = (
    Panel(kind="lines", title="loss", values=("train/loss", "train/eval_loss"), over="train/step"),
    Panel(kind="bars", title="cer", values=(SCORE,)),
    Panel(kind="table", values=("score/samples",)),
    Panel(kind="parallel", title="all", values=(RATE, "config:seed", SCORE)),
    Panel(kind="importance", values=(SCORE,)),
    Panel(kind="scatter", title="rate", values=(SCORE,), over=RATE),
    Panel(kind="differences"),
)
OWN = Dashboard(
    name="toy",
    project="our-project",
    entity="team",
    filter="config:recipe",
    wanted="toy",
    group="run:group",
    sections=(Section(name="Training", panels=PANELS[:1]), Section(name="Sweep", panels=PANELS[1:])),
)
OF_SWEEP = replace(OWN, name="toy sweep 0123456789ab", filter="run:group", wanted="toy-0123456789ab", group="")


@pytest.fixture
def known(server: StandIn) -> Iterator[StandIn]:
    """A server with a project, since a run was shown in it."""
    server.runs["0123456789ab"] = Run()
    yield server


def asked() -> Server:
    return find_server(os.environ)


def without_ids(value: Any) -> Any:
    """Leave out what W&B's package draws by lot."""
    if isinstance(value, dict):
        return {key: without_ids(one) for key, one in value.items() if key != "__id__"}
    return [without_ids(one) for one in value] if isinstance(value, list) else value


def test_the_form_of_a_dashboard_is_the_golden_one() -> None:
    """`UPDATE_GOLDEN=1 pytest` writes it again, to be read in the diff."""
    found = without_ids(make_spec(OWN))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("own", [OWN, OF_SWEEP], ids=["recipe", "sweep"])
def test_a_dashboard_is_read_back_from_its_form(own: Dashboard) -> None:
    assert read_spec(make_spec(own), replace(own, filter="", wanted="", group="", sections=())) == own


def test_a_second_push_saves_in_the_place_of_the_first(known: StandIn) -> None:
    assert find_saved(asked(), OWN) is None
    address = push(asked(), OWN)
    assert address == link(known.url, OWN) == f"{known.url}/team/our-project?nw={OWN.view}"
    changed = replace(OWN, sections=OWN.sections[:1])
    assert push(asked(), changed) == address
    (view,) = known.views.values()
    assert (view["displayName"], view["type"]) == ("toy", "project-view")
    saved = find_saved(asked(), OWN)
    assert saved is not None and saved.dashboard == changed
    push(asked(), OF_SWEEP)
    push(asked(), replace(OWN, entity="other-team"))
    assert len(known.views) == 3 and known.unknown == []


def test_what_a_person_changed_on_the_page_is_a_difference(known: StandIn) -> None:
    push(asked(), OWN)
    (view,) = known.views.values()
    spec = json.loads(view["spec"])
    sections = spec["section"]["panelBankConfig"]["sections"]
    sections[0]["panels"][0]["config"]["metrics"].append("train/grad_norm")
    sections[1]["panels"].append({"viewType": "Markdown Panel", "config": {"value": "note"}})
    sections.append({"name": "Hidden Panels", "panels": []})
    view["spec"] = json.dumps(spec)
    saved = find_saved(asked(), OWN)
    assert saved is not None
    changed = [line for line in compare(saved.dashboard, OWN) if line[0] in "+-"][2:]
    assert changed == [
        '-  lines "loss" train/loss, train/eval_loss, train/grad_norm over train/step',
        '+  lines "loss" train/loss, train/eval_loss over train/step',
        "-  other Markdown Panel",
    ]


@pytest.mark.parametrize("spec", ["{}", '{"section": {"runSets": [], "panelBankConfig": {"sections": [{}]}}}'])
def test_a_view_that_holds_nothing_is_read_as_such(known: StandIn, spec: str) -> None:
    push(asked(), OWN)
    next(iter(known.views.values()))["spec"] = spec
    saved = find_saved(asked(), OWN)
    assert saved is not None and saved.dashboard.sections == ()


def test_without_an_entity_it_is_that_of_the_key(known: StandIn) -> None:
    assert with_entity(asked(), replace(OWN, entity=None)) == OWN


def test_a_project_that_is_not_there_is_said(server: StandIn) -> None:
    with pytest.raises(UsageError, match="no project team/our-project, .* `sousbatch sync`"):
        push(asked(), OWN)
    assert not server.views


def test_a_key_that_is_refused_while_saving_is_one_line(known: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sousbatch.tracking.wandb_views.find_saved", lambda *_: setattr(known, "fault", "refused"))
    with pytest.raises(UsageError, match="the dashboard could not be saved: [^\n]*told to fail") as raised:
        push(asked(), OWN)
    assert "\n" not in str(raised.value)


def test_without_the_package_pushing_alone_is_refused(known: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    push(asked(), OWN)
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UsageError, match=r"needs wandb-workspaces, .*: pip install 'sousbatch\[dashboards\]'"):
        push(asked(), OWN)
    saved = find_saved(asked(), OWN)
    assert saved is not None and compare(saved.dashboard, OWN) == []


@pytest.mark.parametrize(
    ("url", "pages"),
    [
        ("https://api.wandb.ai", "https://forge.coreweave.com/wandb"),
        ("https://api.forge.coreweave.com", "https://forge.coreweave.com/wandb"),
        ("https://api.ours.example", "https://app.ours.example"),
        ("http://ours:8080", "http://ours:8080"),
    ],
)
def test_the_pages_of_a_server_are_where_wandb_looks_for_them(url: str, pages: str) -> None:
    from wandb.util import api_to_app_url

    assert app_url(url) == pages == api_to_app_url(url)
