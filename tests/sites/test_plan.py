"""A plan prints, narrows down, and survives being saved as plain data."""

import json

import pytest

from mp_lightning.backbones import build_backbone
from mp_lightning.errors import SiteError
from mp_lightning.sites import SitePlan, attach, find_sites


@pytest.fixture
def plan():
    return find_sites(build_backbone("resnet20", 10))


def test_round_trip_through_json(plan):
    assert SitePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_narrowing_down(plan):
    assert plan.only("layer3.*").names == ["layer3.0.relu2", "layer3.1.relu2", "layer3.2.relu2"]
    assert len(plan.without("layer1.*", "layer2.0.relu2")) == 5


def test_unknown_pattern_lists_the_candidates(plan):
    with pytest.raises(SiteError, match=r"no site matches 'layer9\.\*'; the sites are: layer1\.0\.relu2"):
        plan.only("layer9.*")


def test_nothing_left_and_duplicates_are_refused(plan):
    with pytest.raises(SiteError, match="at least one site"):
        plan.without("*")
    with pytest.raises(SiteError, match="are the same"):
        SitePlan([next(iter(plan))] * 2)


def test_an_unknown_layout_is_refused(plan):
    data = plan.to_dict()
    with pytest.raises(SiteError, match="layout='channels upside down'"):
        SitePlan.from_dict({**data, "sites": [{**site, "layout": "channels upside down"} for site in data["sites"]]})


def test_foreign_data_is_refused():
    with pytest.raises(SiteError, match="not a plan"):
        SitePlan.from_dict({"version": 3, "sites": []})
    with pytest.raises(SiteError, match="site 'a' of the plan has no key"):
        SitePlan.from_dict({"version": 1, "sites": [{"name": "a"}]})


def test_table_has_a_line_a_site(plan):
    lines = str(plan).splitlines()
    assert len(lines) == 1 + len(plan)
    assert lines[0].split() == ["site", "channels", "rule", "reads"]


def test_channel_norm_is_that_of_the_default_plan(plan):
    model = build_backbone("resnet20", 10)
    assert attach(model, sites=plan.only("layer1.*")).channel_norm == 64
