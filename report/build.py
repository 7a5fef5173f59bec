"""Build the PDF report of one set from its result files.

    python report/build.py               of the environment's study, as analysis/<set>/report.pdf
    python report/build.py --publish     also report/report.pdf and the README's tables

Nothing is computed here: report.typ reads the results, and a missing one is an error. The same
results give the same bytes. Prose that interprets a set is in findings-<set>.typ; if a number that
it names has moved, as on another machine, the set's report is built without it, and the published
one isn't built.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typst

from helpers import config
from helpers.config import PROFILES, ROOT, write_atomically
from helpers.loader import Augmentation
from helpers.notebooks import clock
from helpers.recipes import RECIPES

REPORT = ROOT / "report"


class MovedError(ValueError):
    """A number or verdict of the findings isn't that of the results."""


def build(set_folder: Path, *, with_findings: bool = True) -> bytes:
    """Return the PDF of a set's report.

    Raises FileNotFoundError if the set has no results, MovedError if its findings name a number
    that has moved, and ValueError if a result is missing or a number of the findings is unguarded.
    """
    if not (set_folder / "results").is_dir():
        raise FileNotFoundError(
            f"{set_folder} has no results; run `make study` with the same PROFILE and DATASET first"
        )
    check_one_dataset(set_folder)
    folders = (set_folder, *with_depth(set_folder))
    for folder in folders:
        claims = json.dumps(claims_of_others(folder), indent=1)
        write_atomically(folder / "results" / "claims.json", claims.encode())
    findings = REPORT / f"findings-{set_folder.name}.typ"
    with_findings = with_findings and findings.is_file()
    if with_findings and (unguarded := unguarded_numbers(findings.read_text())):
        raise ValueError(f"{findings} has numbers outside #measured: {unguarded}")
    # Typst reads below one root only; a set elsewhere (ANALYSIS_DIR) is linked in by its own root.
    root = ROOT if set_folder.is_relative_to(ROOT) else Path("/")
    folders = {folder.name: "/" + folder.relative_to(root).as_posix() for folder in folders}
    inputs = {"findings": findings.name if with_findings else "", "recipes": recipe_table()}
    inputs |= {"set": folders.pop(set_folder.name), "beside": json.dumps(folders)}
    try:
        return typst.compile(
            str(REPORT / "report.typ"),
            root=str(root),
            sys_inputs=inputs,
            ignore_system_fonts=True,
            timestamp=0,
        )
    except typst.TypstError as error:
        if with_findings and re.search("has moved|the results have no", str(error)):
            raise MovedError(f"{findings}: {error}. Read it again beside the results") from error
        raise ValueError(
            f"the report of {set_folder} can't be built: {error}. If a result or figure is "
            "missing, run all notebooks with `make study`."
        ) from error


def unguarded_numbers(findings: str) -> list[str]:
    """Return the lines of a findings file with a number that isn't compared with the results.

    Names such as ResNet-18 or layer3 and references are none.
    """
    for known in (r"//.*", r'#\w+\((?:"[^"]*"|[^()"])*\)', r"@[\w-]+", r"\b[A-Za-z]+-?\d+\b"):
        findings = re.sub(known, "", findings)
    return [line.strip() for line in findings.splitlines() if re.search(r"\d", line)]


def recipe_table() -> str:
    """Return the recipes as JSON, a table as the notebooks write them."""
    rows = []
    for recipe in RECIPES.values():
        rate = f"{recipe.learning_rate:g}"
        if recipe.reference_batch_size:
            rate += f" for {recipe.reference_batch_size}"
        momentum = f"{recipe.momentum:g}{' Nesterov' if recipe.nesterov else ''}"
        settings = (recipe.name, recipe.optimizer, rate, recipe.schedule, recipe.batch_size)
        settings += (momentum if recipe.optimizer == "sgd" else "", f"{recipe.weight_decay:g}")
        rows.append([*map(str, settings), described(recipe.augmentation), str(recipe.epochs)])
    names = ["recipe", "optimizer", "learning rate", "schedule", "batch", "momentum"]
    names += ["weight decay", "augmentation", "epochs"]
    return json.dumps({"columns": names, "rows": rows})


def described(augmentation: Augmentation) -> str:
    """Return what an augmentation does; pixels are those of images of 32."""
    sizes = {"shift": augmentation.crop_padding, "cutout": augmentation.cutout}
    parts = ["flip"] * augmentation.flip + [f"{name} {n}" for name, n in sizes.items() if n]
    return ", ".join(parts) or "none"


def claims_of_others(set_folder: Path) -> list[dict[str, object]]:
    """Return the set's verdicts on what others claim, those that have a source, by notebook."""
    names = ("source", "claim", "verdict", "effect", "effects", "unit", "seeds", "trained_out")
    return [
        {"notebook": path.stem} | {name: claim[name] for name in names}
        for path in sorted((set_folder / "results").glob("[0-9][0-9]_*.json"))
        for claim in json.loads(path.read_text()).get("claims", ())
        if claim.get("source")
    ]


def check_one_dataset(set_folder: Path) -> None:
    """Raise ValueError if a set's results are of several datasets.

    Folders of the same name write to the same set, and a folder's images may change. The
    fingerprint is that of one image size. Only results about the study's own data are compared: a
    notebook may look at a second dataset, and says so by its role; a reader's may name none.
    """
    seen: dict[int | str, str] = {}
    for path in sorted((set_folder / "results").glob("[0-9][0-9]_*.json")):
        about = json.loads(path.read_text()).get("data")
        if about is None or about.get("role", "study") != "study":
            continue
        size = about["image_size"]
        for key, found in (("title", about["title"]), (size, about["fingerprint"])):
            expected = seen.setdefault(key, found)
            if found != expected:
                raise ValueError(
                    f"{path} is about {about['title']} ({found}), another result of this set about "
                    f"{expected}. Run all notebooks again with `make study`; for two folders of "
                    "the same name give one another name or ANALYSIS_DIR"
                )


def first_lines(set_folder: Path) -> list[str]:
    """Return what the README says first of maps, depth, regularization and others' claims."""
    names = ("03_regularization", "04_depth", "05_gradcam", "claims")
    files = (set_folder / "results" / f"{name}.json" for name in names)
    regularized, depth, cam, others = (json.loads(file.read_text()) for file in files)
    _, without_mark, with_mark, _ = cam["tables"]["shortcut"]["rows"][1]
    (deeper,) = (c for c in depth["claims"] if c["claim"] == "Deeper is better")
    gains = {name: gain["text"] for name, gain in regularized["differences"].items()}
    words = Counter(claim["verdict"] for claim in others)
    return [
        "- **Right for the wrong reason.** A network that was trained on drawn images with a mark "
        f"in a corner of each is right on {with_mark} % of marked test images, and on "
        f"{without_mark} % of the same images without it. A test on images like its own can't "
        "tell; a map does.",
        f"- **Depth.** On {depth['data']['title']}, “deeper is better”: {deeper['verdict']} "
        f"({deeper['effect']}).",
        f"- **Regularization.** On {regularized['data']['train_size']:,} images augmentation "
        f"changes test accuracy by {gains['augmentation']} points, weight decay by "
        f"{gains['weight decay']}, dropout by {gains['dropout']}, and early stopping, against the "
        f"same constant rate without it, by {gains['early stopping']}.",
        f"- **What others claim.** {len({c['source'] for c in others})} claims of tutorials and "
        f"student projects in {len(others)} tests, each judged by an interval; on what networks "
        "can do, only where these have learnt their training images: "
        f"{', '.join(f'{word} ({count})' for word, count in words.most_common())}.",
    ]


def with_depth(set_folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the results of 04 in a set, and in the published ones beside it, by folder."""
    folders = [set_folder, *(f for f in published_sets() if f.name != set_folder.name)]
    paths = {folder: folder / "results" / "04_depth.json" for folder in folders}
    return {f: json.loads(path.read_text()) for f, path in paths.items() if path.exists()}


def results_section(set_folder: Path) -> str:
    """Return the README's findings and their figure as Markdown."""
    lines = [
        *first_lines(set_folder),
        "",
        "![Six marked images with the maps of two networks: that trained without the mark looks "
        "at the object, that trained with it at the mark in the corner]"
        f"(analysis/{set_folder.name}/figures/05_shortcut.png)",
    ]
    return "\n".join(lines)


def network_table(depth: dict[str, Any]) -> Iterator[str]:
    """Yield the Markdown lines of 04's comparison of networks, and what it was made on."""
    yield "| network | test accuracy (%) | training accuracy (%) | parameters | multiply-adds |"
    yield "|---|---|---|---|---|"
    learnt = {row[0]: row[2] for row in depth["tables"]["accuracy"]["rows"]}
    for name, values in depth["networks"].items():
        costs = values["costs"]
        yield (
            f"| {name} | {values['accuracy']['text']} | {learnt[name]} | "
            f"{costs['parameters'] / 1e3:,.0f} thousand | "
            f"{costs['multiply-adds'] / 1e6:.1f} million |"
        )
    about, profile = depth["data"], depth["profile"]
    yield (
        f"\n{about['title']}, profile {profile['name']}: {about['train_size']:,} training and "
        f"{about['test_size']:,} test images of {about['image_size']} pixels, networks at "
        f"{profile['width']:g} of their usual width, {profile['epochs']} epochs, {depth['seeds']} "
        "seeds; mean and 95 % interval over seeds and test images.\n"
    )


def published_sets() -> list[Path]:
    """Return the folders of the sets that are committed: those that .gitignore lets through."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    folders = [ROOT / line[1:].strip("/") for line in lines if line.startswith("!analysis/")]
    return [folder for folder in folders if (folder / "results").is_dir()]


def profile_table() -> str:
    """Return the README's table of profiles, with the measured times of the published sets.

    Of a set whose runs are published, these are the hours of all of them, a core each.
    """
    lines = [
        "| profile | default dataset | training images | pixels | width | epochs | seeds "
        "| measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for profile in PROFILES.values():
        measured = []
        for folder in published_sets():
            if not folder.name.endswith(f"-{profile.name}"):
                continue
            if archives := [*map(zipfile.ZipFile, folder.glob("runs/*.zip"))]:
                seconds = [json.loads(a.read("result.json"))["seconds"] for a in archives]
                hours = f"{sum(seconds) / 3600:.0f} core-hours of training"
                measured.append(f"{hours} ({folder.name}, {len(seconds)} runs)")
            elif (timed := folder / "results" / "run_times.json").exists():
                times = json.loads(timed.read_text())
                total = clock(sum(times.values()))
                measured.append(f"{total} ({folder.name}, {len(times)} notebooks)")
        size = "all" if profile.train_size is None else f"{profile.train_size:,}"
        lines.append(
            f"| {profile.name} | {profile.default_dataset} | {size} | "
            f"{profile.image_size or 'its own'} | {profile.width:g} | "
            f"{profile.epochs} | {len(profile.seeds)} | {', '.join(measured) or 'not yet'} |"
        )
    return "\n".join(lines)


def fill_readme(text: str, set_folder: Path) -> str:
    """Return the README with its generated tables replaced by those of a published set."""
    networks = (line for depth in with_depth(set_folder).values() for line in network_table(depth))
    tables = {"results": results_section(set_folder), "profiles": profile_table()}
    tables["networks"] = "\n".join(networks).rstrip()
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md lacks the marks <!-- {name} --> ... <!-- /{name} -->")
        table = re.sub(r"(?<=[ \[(])-(?=\d)", "\N{MINUS SIGN}", table)
        text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Build as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the report of one set.")
    parser.add_argument("--publish", action="store_true", help="update report.pdf and README too")
    options = parser.parse_args(arguments)
    study = config.study()
    set_folder = study.folder
    try:
        try:
            pdf = build(set_folder)
        except MovedError as error:
            if options.publish:
                raise
            print(f"{error}. For now the report is built without it.", file=sys.stderr)
            pdf = build(set_folder, with_findings=False)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    targets = [set_folder / "report.pdf"]
    if options.publish:
        targets.append(ROOT / "report" / "report.pdf")
        readme = ROOT / "README.md"
        write_atomically(readme, fill_readme(readme.read_text(), set_folder).encode())
    for target in targets:
        write_atomically(target, pdf)
        print(f"  {'report':20s}{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
