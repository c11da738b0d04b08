"""Hooks of MkDocs: links that leave docs/ go to the repository, and pages that nav does not name stand under "More"."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1]


def on_config(config):
    named = set(re.findall(r"[\w./]+\.md", str(config.nav)))
    if more := sorted(path.name for path in DOCS.glob("*.md") if path.name not in named):
        config.nav.append({"More": more})
    return config


def on_page_markdown(markdown, page, config, files):
    return re.sub(r"\]\(\.\./([^)]+)\)", lambda link: f"]({config.repo_url}/blob/main/{link[1]})", markdown)
