"""The JSON Schemas accept what we accept, for editors."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from hpcsngd.config.present import json_schema, leaves, nested
from hpcsngd.config.resolve import parse_set
from hpcsngd.errors import ConfigError
from hpcsngd.resources import named_files


@pytest.mark.parametrize(
    ("kind", "which", "name"),
    [("site_configs", "site", name) for name in named_files("site_configs")]
    + [("jobs", "experiment", name) for name in named_files("jobs")],
)
def test_shipped_files_fit_the_schema(kind: str, which: str, name: str) -> None:
    # BaseLoader leaves every scalar text; the schema is about keys and structure here, so read typed
    data = yaml.load(named_files(kind)[name].read_text(), Loader=_StrictTypes)
    jsonschema.validate(data, json_schema(which))


def test_schema_refuses_unknown_keys() -> None:
    data = {"description": "x", "scheduler": {"kind": "local"}, "nodse": 1}
    with pytest.raises(jsonschema.ValidationError, match="nodse"):
        jsonschema.validate(data, json_schema("site"))


def test_schema_carries_descriptions() -> None:
    assert json_schema("site")["properties"]["master_port"]["description"].startswith(
        "Port of the rendezvous"
    )


def test_show_nests_with_origins() -> None:
    tree = nested(leaves(None, "digits-hylo", [parse_set("epochs=3")]), with_origins=True)
    assert tree["experiment"]["epochs"] == {"value": 3, "origin": "--set epochs"}


def test_show_refuses_an_override_of_the_absent_part() -> None:
    with pytest.raises(ConfigError, match=r"site\.nodes belongs to the site, and none was named"):
        leaves(None, "digits-hylo", [parse_set("site.nodes=3")])


class _StrictTypes(yaml.SafeLoader):
    """Dates stay text, as in our own loader."""


_StrictTypes.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if "timestamp" not in tag]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
