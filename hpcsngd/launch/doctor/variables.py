"""The variables in a site file: those that are set are expanded, those that are not become findings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcsngd.config.fields import expand
from hpcsngd.config.site import Site
from hpcsngd.errors import ConfigError
from hpcsngd.launch.doctor.finding import Finding, broken


def expanded(site: Site, env: Mapping[str, str]) -> tuple[Site, list[Finding]]:
    """Returns the site with ``${NAME}`` replaced where it can be, and a finding for each unset variable."""
    problems: dict[str, Finding] = {}

    def replace(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: replace(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item, path) for item in value]
        if not isinstance(value, str):
            return value
        try:
            return expand(value, env, path)
        except ConfigError as error:
            text = str(error).partition(": ")[2].partition(";")[0]
            problems.setdefault(text, broken("variables", f"{path}: {text}", "export it before submitting"))
            return value

    return Site.model_validate(replace(site.model_dump(mode="json"), "")), list(problems.values())
