"""Layout rules: which part imports which, where the flags stop, and how long files and functions are."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABOVE = {  # what each part may import, of the project's own
    "util": {"util"},
    "models": {"util", "models"},
    "datasets": {"util", "datasets"},
    "engine": {"util", "models", "datasets"},
    "main": {"util", "models", "datasets", "engine"},
    "run_with_submitit": {"util", "models", "datasets", "engine", "main"},
    "hubconf": {"util", "models"},
}
SEE_FLAGS = {"main.py", "run_with_submitit.py", "util/flags.py", "util/misc.py"}


def sources():
    for part in ABOVE:
        path = ROOT / part
        yield from (
            (part, p) for p in (sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]) if p.exists()
        )


def test_imports_go_one_way():
    for part, path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            own = {name.split(".")[0] for name in names} & set(ABOVE)
            assert own <= ABOVE[part], f"{path.relative_to(ROOT)}:{node.lineno} imports {own - ABOVE[part]}"
            if part not in ("util", "main"):
                assert "util.misc" not in names, f"{path}: util.misc is for code outside"


def test_args_are_read_by_build_functions_only():
    for _, path in sources():
        if str(path.relative_to(ROOT)) in SEE_FLAGS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "build" and not node.name.startswith("build_"):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert "args" not in names, f"{path.name}:{node.lineno} {node.name} takes the flags"


def test_functions_and_files_stay_short():
    for part, path in sources():
        text = path.read_text()
        assert part == "main" or len(text.splitlines()) <= 300, f"{path} is past 300 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "get_args_parser":
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name} is past 50 lines"


def test_every_file_says_what_it_owns():
    for _, path in sources():
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and doc.splitlines()[0].endswith((".", ":")), path
