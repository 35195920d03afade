"""README and docs: links lead somewhere, and flags exist."""

import re
from pathlib import Path

import pytest

import main
import run_with_submitit
from tools import (
    benchmark,
    check_dataset,
    convergence,
    convert,
    draw_panoptic,
    export,
    import_data,
    model_table,
    predict,
    report,
    show_predictions,
)

ROOT = Path(__file__).parents[1]
TOOLS = (
    benchmark, check_dataset, convergence, convert, draw_panoptic, export, import_data, model_table, predict, report,
    show_predictions,
)  # fmt: skip
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").glob("*.md")])
NOT_OURS = {  # flags of other programs in the pages' commands
    "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--ntasks-per-node",
    "--kill-on-bad-exit", "--kills", "--durations", "--logdir",
    "--build", "--onnx", "--saveEngine", "--minShapes", "--optShapes", "--maxShapes", "--output_model", "--fp16",
}  # fmt: skip


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_links_lead_to_files_and_headings(page):
    text = re.sub(r"<!--.*?-->", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_flags_exist(page):
    parsers = [main.get_args_parser()]
    parsers += [tool.get_args_parser() for tool in TOOLS]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= set(re.findall(r'add\("(--\w+)"', Path(run_with_submitit.__file__).read_text()))
    known |= set(re.findall(r'^\+    add\("(--\w+)"', page.read_text(), re.M))  # in an example
    text = re.sub(r"^```diff.*?^```", "", page.read_text(), flags=re.M | re.S)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named <= known | NOT_OURS, f"{page.name}: {sorted(named - known - NOT_OURS)}"
