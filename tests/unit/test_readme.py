from __future__ import annotations

import re
from pathlib import Path

from watchd.cli import VERBS

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_every_verb_and_no_other() -> None:
    verbs = re.findall(r"^\| `watchd (\w+)", README, re.MULTILINE)
    assert set(verbs) == set(VERBS)


def test_no_link_of_the_readme_leads_nowhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_make_knows_every_target_that_the_readme_names() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
