"""What the site shows of the published set: its findings, the notebooks and the API of helpers.

Everything is read from committed files when the site is built. Nothing of the study is imported, so
that the build needs neither torch nor any other of its packages.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent


def published_sets() -> list[Path]:
    """Return the folders of sets with results that .gitignore lets in; the first has everything."""
    names = re.findall(r"^!(analysis/[^/]*)/?$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    return [ROOT / name for name in names if (ROOT / name / "results").is_dir()]


def published_set() -> Path:
    """Return the folder of the set that the site is about."""
    return published_sets()[0]


def results(name: str, folder: Path | None = None) -> Any:
    """Return one result file of the published set, or of another."""
    path = (folder or published_set()) / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def write_pages(folder: str, pages: dict[str, str]) -> None:
    """Write pages, by file name, into a folder of the site that has nothing else."""
    shutil.rmtree(SITE / folder, ignore_errors=True)
    (SITE / folder).mkdir()
    for name, text in pages.items():
        (SITE / folder / name).write_text(text, encoding="utf-8")


# --- findings --------------------------------------------------------------------------------


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (columns, *rows)]
    # An interval stays on one line.
    cells = [[re.sub(r", (?=\S+\]$)", ",\N{NO-BREAK SPACE}", c) for c in row] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def with_minus(text: str) -> str:
    """Return a text whose negative numbers have a minus sign; ResNet-18 keeps its hyphen."""
    return re.sub(r"(?<![\w-])-(?=[0-9])", "\N{MINUS SIGN}", text)


def link(notebook: str) -> str:
    """Return a link to a notebook's page, by the notebook's name."""
    return f"[{notebook}](notebooks/{notebook}.ipynb)"


def findings() -> dict[str, str]:
    """Return the passages that the pages put where they say {{ name }}, as Markdown."""
    cam = results("05_gradcam")
    others = [
        f"- “{c['source']}”: **{c['verdict']}.** {c['claim']}: {with_minus(c['effect'])}. "
        f"({c['seeds']} seed{'s' * (c['seeds'] > 1)}, {link(c['notebook'])})"
        for c in results("claims")
    ]
    figure = Path("..") / published_set().relative_to(ROOT) / "figures" / "05_shortcut.png"
    return {
        "main": main_findings(),
        "networks": "\n\n".join(map(networks, published_sets())),
        "others": "\n".join(others),
        "shortcut": table(**cam["tables"]["shortcut"]),
        "figure": "![Six marked images with the maps of two networks: that trained without the "
        "mark looks at the object, that trained with it at the mark in the "
        f"corner]({figure.as_posix()})",
        "verdicts": "\n\n".join(part for folder in published_sets() for part in verdicts(folder)),
    }


def main_findings() -> str:
    """Return the README's findings and three more as a list in Markdown."""
    marked = re.search("<!-- results -->(.*?)!\\[", (ROOT / "README.md").read_text(), re.DOTALL)
    recipes, transfer, pruning = (
        {row[0]: row[1:] for row in results(name)["tables"][of]["rows"]}
        for name, of in (
            ("07_training_recipes", "against_own"),
            ("08_transfer", "accuracy"),
            ("09_pruning", "differences"),
        )
    )
    columns = results("08_transfer")["tables"]["accuracy"]["columns"][1:]
    fewest = next(iter(transfer))
    reached = dict(zip(columns, transfer[fewest], strict=True))
    more = (
        f"- **Recipe.** Adam without augmentation is at {recipes['adam'][0]} points against the "
        f"study's own recipe, on equal epochs ({link('07_training_recipes')}).\n"
        f"- **Transfer.** Trained on {fewest} images, a network from scratch is right on "
        f"{reached['from scratch']} % of new ones, one that is fine-tuned from other classes on "
        f"{reached['fine-tuning all']} % ({link('08_transfer')}).\n"
        f"- **Pruning.** Nine tenths of the weights at zero and fine-tuned change accuracy by "
        f"{pruning['weights 90 %'][1]} points ({link('09_pruning')})."
    )
    return f"{marked[1].strip()}\n{with_minus(more)}"


def about(folder: Path) -> str:
    """Return what a set's results were made on."""
    depth = results("04_depth", folder)
    data, profile = depth["data"], depth["profile"]
    return (
        f"{data['title']}, profile {profile['name']}: {data['train_size']:,} training and "
        f"{data['test_size']:,} test images of {data['image_size']} pixels, networks at "
        f"{profile['width']:g} of their usual width, {profile['epochs']} epochs, {depth['seeds']} "
        "seeds."
    )


def page(notebook: str, folder: Path) -> str:
    """Return the name of the page that shows a notebook as it was run for a set."""
    return notebook if folder == published_set() else f"{folder.name}-{notebook}"


def networks(folder: Path) -> str:
    """Return a set's comparison of networks, what it was made on and where it is, as Markdown."""
    accuracy = results("04_depth", folder)["tables"]["accuracy"]
    shown = table(accuracy["columns"][:5], [row[:5] for row in accuracy["rows"]])
    measured = f"How it was measured is in {link(page('04_depth', folder))}."
    return f"{shown}\n\n{about(folder)} {measured}"


def verdicts(folder: Path) -> Iterator[str]:
    """Return what a set was made on, and each notebook's hypotheses with their verdicts."""
    yield f"## {results('04_depth', folder)['data']['title']}\n\n{about(folder)}"
    for path in sorted((folder / "results").glob("[0-9][0-9]_*.json")):
        claims = results(path.stem, folder).get("claims", ())
        lines = [f"- {with_minus(c['text'])}" for c in claims]
        if lines:
            yield "\n".join([f"### {link(page(path.stem, folder))}", "", *lines])


# --- notebooks -------------------------------------------------------------------------------


def notebooks_of(folder: Path) -> list[Path]:
    """Return the notebooks as they were run for a set: its own if these are committed, too."""
    own = f"!{folder.relative_to(ROOT).as_posix()}/notebooks/" in (ROOT / ".gitignore").read_text()
    return sorted((folder if own else ROOT).glob("notebooks/*.ipynb"))


def notebook_pages() -> dict[str, str]:
    """Return each set's notebooks, with the code of set-up and of answers to exercises folded.

    Those of all sets but the first have the set's name before theirs.
    """
    pages = {}
    names = "|".join(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    of_sets = {folder: notebooks_of(folder) for folder in published_sets()}
    paths = {p: f"{page(p.stem, folder)}.ipynb" for folder, ps in of_sets.items() for p in ps}
    for path, name in paths.items():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        head = "".join(notebook["cells"][0]["source"])
        if path.parent != ROOT / "notebooks":
            head = re.sub(r"\*\*Run time\.\*\*.*", "", head)  # of the set in notebooks/
        if name != path.name:
            of_set = name.removesuffix(f"-{path.name}")
            head = re.sub(r"(?m)^# .*", rf"\g<0> on {of_set}", head, count=1)
        notebook["cells"][0]["source"] = head.splitlines(keepends=True)
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            tags = cell["metadata"].get("tags", [])
            if {"set-up", "answer"} & {*tags}:
                cell["metadata"]["tags"] = [*tags, "hide-input"]
            if cell["cell_type"] == "markdown":
                # Jupyter's links to headings keep capitals, and other notebooks are named in code.
                text = re.sub(r"\]\(#(.*?)\)", lambda m: m[0].lower(), text)
                cell["source"] = re.sub(rf"(?<!\[)`({names})`", r"[\1](\1.ipynb)", text)
        pages[name] = json.dumps(notebook)
    return pages


# --- API -------------------------------------------------------------------------------------


def api_pages() -> dict[str, str]:
    """Return a page for each module of helpers, from its source, and one that lists them."""
    rows, pages = [], {}
    for path in sorted((ROOT / "helpers").glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        summary = prose(tree).partition("\n\n")[0].replace("\n", " ")
        rows.append((f"[{path.stem}]({path.stem}.md)", summary))
        lines = [f"# {path.stem}", "", f"```{{py:module}} helpers.{path.stem}", "```", ""]
        lines += [prose(tree), "", *(part for node in tree.body for part in describe(node))]
        pages[f"{path.stem}.md"] = "\n".join(lines) + "\n"
    tree = ast.parse((ROOT / "helpers" / "__init__.py").read_text(encoding="utf-8"))
    parts = ["# The package helpers", prose(tree), table(["module", "what it is for"], rows)]
    parts.append("\n".join(["```{toctree}", ":hidden:", "", *pages, "```"]))
    return pages | {"index.md": "\n\n".join(parts) + "\n"}


def prose(node: ast.AST) -> str:
    """Return a docstring as Markdown: parameters as a list, columns as they are."""
    parameters = "|".join(n.arg for n in ast.walk(node) if isinstance(n, ast.arg)) or "$"
    blocks = (ast.get_docstring(node) or "").split("\n\n")
    for i, block in enumerate(blocks):
        if len(re.findall(r"^\w+ {2,}\S", block, re.MULTILINE)) > 1:
            blocks[i] = "\n".join(f"    {line}" for line in block.splitlines())
        elif not block.startswith("    "):
            block = re.sub(rf"^({parameters}): ", r"- **\1**: ", block, flags=re.MULTILINE)
            # Outside of code, what stands in angle brackets is no HTML.
            parts = re.split(r"(`[^`]*`)", block)
            blocks[i] = "".join(p if p.startswith("`") else p.replace("<", r"\<") for p in parts)
    return "\n\n".join(blocks)


def describe(node: ast.AST, within: str = "") -> Iterator[str]:
    """Return a public function or class with its methods, as lines of Markdown."""
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    fence = ":::" if within else "::::"
    if isinstance(node, ast.ClassDef):
        yield f"{fence}{{py:class}} {node.name}({fields(node)})"
    elif within and {"property", "functools.cached_property"} & decorators:
        yield f"{fence}{{py:property}} {node.name}"
        yield f":type: {ast.unparse(node.returns)}" if node.returns else ""
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{fence}{{py:{'method' if within else 'function'}}} {call(node, within)}{returns}"
    yield from ("", prose(node), "")
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        yield from describe(inner, within=node.name)
    yield from (fence, "")


def call(node: ast.FunctionDef, within: str) -> str:
    """Return a function's name and parameters, a method's without its first."""
    if within and not any(ast.unparse(d) == "staticmethod" for d in node.decorator_list):
        node.args.args = node.args.args[1:]
    return f"{node.name}({ast.unparse(node.args)})"


def fields(node: ast.ClassDef) -> str:
    """Return what a class is made from: a dataclass's fields, or the parameters of __init__."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return call(inner, node.name).removeprefix("__init__(").removesuffix(")")
    found = []
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and not inner.target.id.startswith("_"):
            value = "" if inner.value is None else ast.unparse(inner.value)
            default = "" if not value or value.startswith("field(") else f" = {value}"
            found.append(f"{inner.target.id}: {ast.unparse(inner.annotation)}{default}")
    return ", ".join(found)
