"""The site shows what is published. `make site` builds it and checks its links."""

from __future__ import annotations

import base64
import importlib.util
import json
from types import ModuleType

from helpers.config import ROOT


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


content = load("site/content")
MAPS = ROOT / "site" / "explorer" / "maps.json"


def test_the_explorer_s_maps_are_those_of_the_published_set() -> None:
    maps, depth = json.loads(MAPS.read_text()), content.results("04_depth")
    assert MAPS.stat().st_size < 5_000_000
    assert maps["set"] == content.published_set().name
    assert maps["classes"] == depth["data"]["classes"]
    assert [network["name"] for network in maps["networks"]] == list(depth["networks"])
    wrong = 0
    for image in maps["images"]:
        for network, answer in zip(maps["networks"], image["answers"], strict=True):
            assert abs(sum(answer["shares"]) - 1) < 0.01
            for layer, grids in zip(network["layers"], answer["maps"], strict=True):
                height, width = layer["size"]
                levels = base64.b64decode(grids)
                assert len(levels) == len(maps["classes"]) * height * width
                assert max(levels) == 255
        predicted = [a["shares"].index(max(a["shares"])) for a in image["answers"]]
        wrong += predicted != [image["label"]] * len(predicted)
    assert 0 < wrong < len(maps["images"])


def test_findings_are_those_of_the_result_files() -> None:
    assert content.published_set() == load("report/build").published_sets()[0]
    shown, readme = content.findings(), (ROOT / "README.md").read_text()
    for name, values in content.results("04_depth")["networks"].items():
        row = f"| {name} | {values['accuracy']['text']} |"
        assert row in readme
        assert row in shown["networks"].replace("\N{NO-BREAK SPACE}", " ")
    for claim in content.results("claims"):
        assert claim["claim"] in shown["others"] and claim["effect"] in shown["others"]
    for row in content.results("05_gradcam")["tables"]["shortcut"]["rows"]:
        assert f"| {' | '.join(row)} |" in shown["shortcut"]


def test_a_page_names_only_passages_that_there_are() -> None:
    text = "".join(path.read_text() for path in content.SITE.glob("*.md"))
    assert all(f"{{{{ {name} }}}}" in text for name in content.findings())
