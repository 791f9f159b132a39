"""What holds the folders apart: the import graph, entry points, committed text, the hot path, figures of the README."""

from __future__ import annotations

import ast
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("pipeline", "models")
APPLICATIONS = ("train", "tools")
OPTIONAL = (
    "ffcv",
    "nvidia",
    "webdataset",
    "cv2",
    "kornia",
    "timm",
    "transformers",
    "onnx",
    "sklearn",
    "skimage",
    "pycocotools",
    "faster_coco_eval",
    "segmentation_models_pytorch",
    "matplotlib",
    "onnxruntime",
    "ray",
    "wandb",
    "mlflow",
    "trackio",
)


def committed() -> list[Path]:
    """Files that git tracks and that are there."""
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout
    return [path for name in names.decode().split("\0") if name and (path := ROOT / name).is_file()]


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Absolute module names that are imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node


def module_level(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: those outside functions and `if TYPE_CHECKING`."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def everywhere(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports that can run: those in functions too, but not those under `if TYPE_CHECKING`."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                yield child
                yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.smoke
def test_libraries_import_neither_each_other_nor_applications() -> None:
    wrong = []
    for path in sources(*LIBRARIES):
        for name, node in imports(ast.parse(path.read_text())):
            top = name.partition(".")[0]
            if top in (*LIBRARIES, *APPLICATIONS, "regatta", "tests"):
                # A library inside itself imports relatively, so that it works under both of its names.
                wrong.append(f"{relative(path)}:{node.lineno} imports {name}")  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)


def test_relative_imports_stay_inside_their_package() -> None:
    wrong = []
    for path in sources(*LIBRARIES):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                wrong.append(f"{relative(path)}:{node.lineno}")
    assert not wrong, wrong


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_time_graph() -> dict[str, set[str]]:
    """Module -> the modules and packages that importing it imports, ours by full name, others by their top name."""
    return import_graph(module_level)


def import_graph(chosen: Callable[[ast.Module], Iterator[ast.Import | ast.ImportFrom]]) -> dict[str, set[str]]:
    """Module -> what its chosen imports and the import of its package reach, ours by full name, others by their top."""
    paths = {module_name(path): path for path in sources(*LIBRARIES, *APPLICATIONS)}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        reached = {package} if package and package != module else set()
        for node in chosen(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.Import):
                found = names
            else:
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, node.module or ""]).strip(".")
                found = [base, *(f"{base}.{name}" for name in names)]
            reached |= {name if name in paths else name.partition(".")[0] for name in found if name}
        graph[module] = reached
    return graph


def test_what_is_optional_is_imported_only_where_it_is_used() -> None:
    graph = import_time_graph()
    starts = [module_name(path) for path in entry_files()]
    starts += ["pipeline.loaders", "models.methods", "train.recipes"]
    for start in starts:
        waiting, seen = [(start, start)], set()
        while waiting:
            module, way = waiting.pop()
            assert module not in OPTIONAL, f"importing {start} imports an optional package: {way}"
            for name in graph.get(module, ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append((name, f"{way} -> {name}"))


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that lie on a circle of imports, or between two of them.

    Importing a module imports its package first; that is no decision of the module, so it closes no circle.
    """
    left = {
        name: {to for to in reached if to in graph and not f"{name}.".startswith(f"{to}.")}
        for name, reached in graph.items()
    }
    while True:
        reached = set().union(*left.values())
        kept = {name: to & left.keys() for name, to in left.items() if to & left.keys() and name in reached}
        if kept == left:
            return set(kept)
        left = kept


def test_arrows_between_applications_point_one_way() -> None:
    wrong = []
    for folder, later in (("train", ("tools", "tests")), ("tools", ("tests",))):
        for path in sources(folder):
            found = imports(ast.parse(path.read_text()))
            wrong += [f"{relative(path)} imports {name}" for name, _ in found if name.partition(".")[0] in later]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not circles(import_time_graph())


def test_no_function_hides_a_circle_of_imports() -> None:
    assert not circles(import_graph(everywhere))


def test_one_module_knows_the_files_of_a_run() -> None:
    # The other `config.json` is the one that transformers wants beside an exported model.
    allowed = {"train/record/run.py", "tools/support/exports.py"}
    wrong = []
    for path in sources(*APPLICATIONS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ("config.json", "metrics.jsonl"):
                wrong.append(f"{relative(path)}:{node.lineno} names {node.value}")
    assert not [line for line in wrong if line.partition(":")[0] not in allowed], "\n".join(wrong)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"c"}, "e": set()}) == {"b", "c"}
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": {"numpy"}})
    assert not circles({"p": {"p.a"}, "p.a": {"p"}})


def entry_files() -> list[Path]:
    return [path for path in sources(*APPLICATIONS) if '__name__ == "__main__"' in path.read_text()]


def test_entry_files_put_the_checkout_first() -> None:
    for path in entry_files():
        body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
        guard = next(number for number, node in enumerate(body) if ast.unparse(node).startswith("if not __package__"))
        depth = len(path.relative_to(ROOT).parts) - 1
        assert f"parents[{depth}]" in ast.unparse(body[guard]), f"{relative(path)}: another folder is put on the path"
        for node in body[:guard]:
            for name, _ in imports(ast.Module([node], [])):
                assert name.partition(".")[0] in sys.stdlib_module_names, f"{relative(path)} imports {name} first"


def test_no_entry_file_s_neighbour_hides_a_standard_module() -> None:
    hidden = [relative(path) for path in sources(*APPLICATIONS) if path.stem in sys.stdlib_module_names]
    assert not hidden, f"imported in place of the standard library's before the guard has run: {hidden}"


HELP_DRIVER = """
import contextlib, os, runpy, sys, traceback
import numba, torch, torchvision  # once, for all of them

for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.argv[:] = [path, "--help"]
        sys.path[0] = os.path.dirname(path)  # as Python does for a script
        code = 0
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), path, flush=True)
"""


def test_every_entry_point_helps_from_a_foreign_directory(tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    paths = [str(path) for path in entry_files()]
    assert len(paths) >= 3
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", HELP_DRIVER, *paths]
    answer = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    said = f"exit code {answer.returncode}: {answer.stderr[-2000:]}"
    assert sorted(answer.stdout.splitlines()) == sorted(f"0 {path}" for path in paths), said


def test_an_entry_point_also_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "tools.report", "--help"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and "usage" in answer.stdout, answer.stderr[-500:]


# --- committed text --------------------------------------------------------------------------------------------------

TEXT = (".py", ".sh", ".md", ".toml", ".txt", ".css", ".cpp", ".h", ".cu", ".cuh", ".json", ".csv", "")
# Written in pieces, so that this file does not contain what it looks for.
FOREIGN = {
    "a registry's address": r"(pypi|pythonhosted)[.]org|index-ur[l]|find-link[s] *=|deb[.]debian[.]org",
    "a path of one machine": r"(?<![\w.$}])/(wor[k]|roo[t]|hom[e]/\w+|Use[r]s)/",
    "a hash of one registry": r"--has[h]=sha256",
    "a debugger": r"^\s*(import (pd[b]|ipd[b])|breakpoin[t]\()",
}


def test_no_committed_file_is_tied_to_a_machine_or_registry() -> None:
    wrong = []
    for path in committed():
        if path.suffix not in TEXT:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            wrong += [
                f"{relative(path)}:{number} has {what}" for what, pattern in FOREIGN.items() if re.search(pattern, line)
            ]
    assert not wrong, "\n".join(wrong)


def test_no_image_or_large_file_is_committed() -> None:
    pictures = {".jpg", ".jpeg", ".tar", ".beton", ".whl", ".so", ".safetensors", ".pt", ".pth"}
    wrong = [relative(p) for p in committed() if p.suffix.lower() in pictures or p.stat().st_size > 1 << 20]
    assert not wrong, wrong


def test_nothing_is_pickled() -> None:
    allowed = {"tools/support/exports.py", "train/backbone_io.py"}
    wrong = []
    for path in sources(*LIBRARIES, *APPLICATIONS):
        tree = ast.parse(path.read_text())
        wrong += [
            f"{relative(path)} imports {name}" for name, _ in imports(tree) if name in ("pickle", "dill", "shelve")
        ]
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if text.startswith("torch.save(") or (text.startswith("torch.load(") and "weights_only=True" not in text):
                wrong.append(f"{relative(path)}:{node.lineno} calls {text[:60]}")  # type: ignore[attr-defined]
    # A target format that is a pickle (detectron2's), and weights that others saved as one, are their files' business.
    assert not [line for line in wrong if not line.startswith(tuple(allowed))], "\n".join(wrong)


def test_constructors_say_what_they_take() -> None:
    wrong = []
    for path in sources("models"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.args.kwarg:
                wrong.append(f"{relative(path)}:{node.lineno} takes **{node.args.kwarg.arg}")
    assert not wrong, "\n".join(wrong)


# --- the hot path ----------------------------------------------------------------------------------------------------

HOST_FUNCTIONS = {
    "host_state",
    "load_host_state",
    "__init__",
    "_load_from_state_dict",
    "__repr__",
    "extra_repr",
}


def synchronisations(tree: ast.AST, everywhere: bool) -> Iterator[tuple[int, str]]:
    """Calls that make the host wait for the device, as (line, source).

    `.item()`, and with `everywhere` also `.tolist()`, `.cpu()`, `.numpy()` and `.nonzero()`, of anything; `int`,
    `float` and `bool` of what is not plainly a host value.
    """
    known = host_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("item", "tolist", "cpu", "numpy", "nonzero"):
            if function.attr == "item" or everywhere:
                yield node.lineno, ast.unparse(node)
        elif isinstance(function, ast.Name) and function.id in ("int", "float", "bool") and node.args:
            if not is_host_value(node.args[0], known):
                yield node.lineno, ast.unparse(node)


def host_names(tree: ast.AST) -> set[str]:
    """Names that hold host values: arguments annotated as numbers, and what is computed from host values alone."""
    known = {
        each.arg
        for each in ast.walk(tree)
        if isinstance(each, ast.arg)
        and each.annotation
        and ast.unparse(each.annotation) in ("int", "float", "bool", "str")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            known |= {to.id for to, value in pairs if isinstance(to, ast.Name) and is_host_value(value, known)}
    return known


HOST_EXPRESSION = re.compile(
    r"^(len|round|math\.\w+|int|os\.environ\.get|np\.\w+)\(|\.(shape|ndim|(size|stride|numel)\(\w*\))(\[.*\])?$|^[A-Z_]+$"
)


def is_host_value(node: ast.AST, known: set[str]) -> bool:
    """Constants, shapes, `len(...)`, names in capitals, names known to hold host values, and arithmetic on those."""
    if isinstance(node, ast.Constant | ast.JoinedStr):
        return True
    if isinstance(node, ast.Compare):
        return all(is_host_value(part, known) for part in (node.left, *node.comparators))
    if isinstance(node, ast.BinOp):
        return is_host_value(node.left, known) and is_host_value(node.right, known)
    if isinstance(node, ast.Name) and node.id in known:
        return True
    return bool(HOST_EXPRESSION.search(ast.unparse(node)))


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("folder", ["models/methods", "models"])
def test_no_method_waits_for_the_device(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).glob("*.py")):
        for function in functions(path):
            if function.name in HOST_FUNCTIONS or _is_on_host(function):
                continue
            wrong += [f"{relative(path)}:{line} {text}" for line, text in synchronisations(function, everywhere=False)]
    assert not wrong, "\n".join(sorted(set(wrong)))


def _is_on_host(function: ast.FunctionDef) -> bool:
    """Functions without a tensor among what they take or give: they work on host values."""
    annotations = [
        ast.unparse(a.annotation) for a in ast.walk(function.args) if isinstance(a, ast.arg) and a.annotation
    ]
    takes_self = bool(function.args.args) and function.args.args[0].arg == "self"
    text = " ".join([*annotations, ast.unparse(function.returns) if function.returns else ""])
    return not takes_self and not re.search(r"Tensor|StepInputs|StepOutput|Module", text)


def test_the_step_does_not_wait_for_the_device() -> None:
    path = ROOT / "train" / "loop.py"
    steps = {function.name: function for function in functions(path)}
    assert "take_step" in steps, "the step has another name now; this lint must follow it"
    for name in ("take_step", "_forward_backward", "_accumulate", "_joined"):
        if name in steps:
            found = list(synchronisations(steps[name], everywhere=True))
            assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    ("source", "waits"),
    [
        ("x.item()", True),
        ("int(self.pointer)", True),
        ("float(loss)", True),
        ("float(loss.detach())", True),
        ("int(x.shape[0])", False),
        ("float(len(x))", False),
        ("int(2 * len(x))", False),
        ("bool(loss > 3)", True),
        ("bool(len(x) > 3)", False),
        ("rows = x.numel() // 3\nfloat(rows)", False),
        ("rows = x.sum()\nfloat(rows)", True),
        ("loss.detach()", False),
    ],
)
def test_the_lint_finds_what_it_should(source: str, waits: bool) -> None:
    assert bool(list(synchronisations(ast.parse(source), everywhere=True))) == waits


# --- figures of the README -------------------------------------------------------------------------------------------


def benchmark_tables() -> list[Path]:
    """The tables of benchmarks; a plan's table has a row a run, with the columns of `tools/support/plans.py`."""
    return sorted(set((ROOT / "tools" / "results").glob("*.csv")) - {ROOT / "tools" / "results" / "imagenette.csv"})


def result_rows() -> list[dict[str, str]]:
    rows = []
    for path in benchmark_tables():
        with path.open(newline="") as stream:
            rows += [{**row, "file": path.name} for row in csv.DictReader(stream)]
    return rows


def test_result_files_have_the_contract_s_columns() -> None:
    wanted = set("date commit benchmark contender setting metric unit median p20 p80 n device cpu cores torch".split())
    for path in benchmark_tables():
        with path.open(newline="") as stream:
            reader = csv.DictReader(stream)
            assert wanted <= set(reader.fieldnames or ()), f"{path.name} lacks {wanted - set(reader.fieldnames or ())}"
            for number, row in enumerate(reader, start=2):
                values = [float(row[name]) for name in ("p20", "median", "p80")]
                assert values == sorted(values), f"{path.name}:{number}: percentiles out of order"
                assert int(row["n"]) >= 1, f"{path.name}:{number}"


FIGURE = re.compile(r"(\d[\d,]*(?:\.\d+)?) (images/s|views/s|GB/s|MiB/s|ms|µs|times)\b")


def has_row(value: float, digits: int, rows: list[dict[str, str]]) -> bool:
    """Whether a rounded figure is the median of a row, or a ratio of two of one benchmark and setting."""
    tolerance = 0.5 * 10.0**-digits + 1e-9
    medians: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        key = (row["benchmark"], row["setting"], row["metric"])
        medians.setdefault(key, []).append(float(row["median"]))
    for same in medians.values():
        close = tolerance if digits else max(tolerance, 0.006 * value)
        if any(abs(m - value) <= close for m in same):
            return True
        if any(b and abs(a / b - value) <= tolerance for a in same for b in same):
            return True
    return False


PAGES = ("README.md", "tools/results/README.md", ".github/CONTRIBUTING.md", ".github/CHANGELOG.md")
"""Pages that a visitor reads figures on."""


@pytest.mark.parametrize("name", PAGES)
def test_each_speed_on_a_page_has_its_row(name: str) -> None:
    page = ROOT / name
    rows = result_rows()
    wrong = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if re.search(r"published|projection|official|aim", line, re.IGNORECASE):
            continue
        for text, unit in FIGURE.findall(line):
            value = float(text.replace(",", ""))
            if not has_row(value, len(text.partition(".")[2]), rows):
                wrong.append(f"{name}:{number}: {text} {unit} has no row in tools/results")
    assert not wrong, "\n".join(wrong)


def test_a_figure_without_a_row_is_found() -> None:
    row = {"benchmark": "b", "setting": "s", "metric": "m"}
    rows = [{**row, "median": "1234.4"}, {**row, "median": "400.0"}]
    assert has_row(1234.0, 0, rows) and has_row(3.1, 1, rows)
    assert not has_row(3.3, 1, rows) and not has_row(1500.0, 0, rows)


def test_files_named_on_a_page_exist() -> None:
    pages = [path for path in committed() if path.suffix == ".md"]
    assert len(pages) > 3
    pattern = r"(?<![\w/.-])((?:tools|train|pipeline|models|tests)/[\w/.-]+\.(?:py|sh|txt|cpp|h|cu|csv|svg|md))"
    missing = [
        f"{relative(page)}: {name}"
        for page in pages
        for name in sorted(set(re.findall(pattern, page.read_text())))
        if not (ROOT / name).exists()
    ]
    assert not missing, missing


def test_links_between_pages_lead_somewhere() -> None:
    wrong = []
    for page in (path for path in committed() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                wrong.append(f"{relative(page)} links to {target}")
    assert not wrong, wrong


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
