"""The house rules that a machine can check: import direction, file sizes, names, docstrings."""

import ast
import io
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest

import minipeft

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "minipeft").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

LEVELS = [  # files, and folders with all that is in them; each imports from its own and from above
    {"adapters"},
    {"ops.py"},
    {"lora.py", "nf4.py"},
    {"double_quant.py"},
    {"qlora.py", "inject.py", "prefix.py"},
    {"fast", "quantized"},
    {"layers"},
    {"starts", "optim"},
    {"model"},
    {"integrations"},
    {"io"},
    {"measure"},
    {"__init__.py"},
]
THIRD_PARTY = {"torch", "numpy", "einops", "jaxtyping", "tqdm"}
OF_FOLDERS = {
    "io": {"safetensors"},
    "integrations": {"transformers"},
    "measure": {"matplotlib", "rich"},  # inside functions
}


def part(path: Path) -> str:
    """The first name below minipeft/: a file's stem or its top folder."""
    return path.relative_to(ROOT / "minipeft").parts[0].removesuffix(".py")


def level(path: Path) -> int:
    """The number of the level that names this file, or the folder that it is in."""
    place = path.relative_to(ROOT / "minipeft")
    for name in (str(place), place.parts[0]):
        for number, names in enumerate(LEVELS):
            if name in names:
                return number
    raise AssertionError(f"{place} has no place in the import order; put it into LEVELS")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            module = node.module or ""
            found += [f"{module}.{a.name}" if module == "minipeft" else module for a in node.names]
    return found


def code_lines(text: str) -> int:
    """Lines that hold code: no comment, no blank, no docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            statement = node.body[0]
            documentation.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    if path.parent == ROOT / "minipeft" and path.name == "__init__.py":
        return
    own = part(path)
    for other in files_imported(path.read_text()):
        assert level(other) <= level(path), f"{path} must not import {other}"
    for name in imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        if top == "minipeft":
            assert name != top, f"{path.name} imports the package as a whole"
        elif top not in sys.stdlib_module_names:
            allowed = THIRD_PARTY | OF_FOLDERS.get(own, set())
            assert top in allowed, f"{path.name} imports {name}"


def file_of(name: str) -> Path | None:
    """The file in minipeft/ that a dotted name stands for, as a module or as a package."""
    place = ROOT.joinpath(*name.split("."))
    known = {place.with_suffix(".py"), place / "__init__.py"} & set(FILES)
    return known.pop() if known else None


def files_imported(text: str) -> set[Path]:
    """The files of minipeft/ that this source imports, at the top or inside functions.

    `from package import name` is the submodule of that name; where there is none, the package.
    """
    found: set[Path | None] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {file_of(f"{module}.{a.name}") or file_of(module) for a in node.names}
    return {path for path in found if path is not None}


def below(start: Path, edges: dict[Path, set[Path]]) -> set[Path]:
    """The files that one file imports, and those that they import."""
    seen, todo = set(), list(edges[start])
    while todo:
        if (path := todo.pop()) not in seen:
            seen.add(path)
            todo += edges[path]
    return seen


def circles(edges: dict[Path, set[Path]]) -> list[list[str]]:
    """The sets of files that reach each other, by their paths."""
    reach = {path: below(path, edges) for path in edges}
    sets = {frozenset(p for p in reach[q] if q in reach[p]) for q in edges if q in reach[q]}
    return [sorted(str(path.relative_to(ROOT)) for path in found) for found in sets]


def test_files_import_each_other_without_cycles():
    assert circles({path: files_imported(path.read_text()) for path in FILES}) == []


def test_files_imported_follows_packages_and_looks_into_functions():
    text = """
from minipeft.io.peft import CONFIG_NAME, config
from minipeft.io import seal

def load():
    from minipeft import inject
    import minipeft.io.files
"""
    found = {str(path.relative_to(ROOT / "minipeft")) for path in files_imported(text)}
    names = {"io/peft/__init__.py", "io/peft/config.py", "io/seal.py", "inject.py", "io/files.py"}
    assert found == names


def test_circles_finds_files_that_reach_each_other():
    a, b, c = (ROOT / name for name in "abc")
    assert circles({a: {b}, b: {c}, c: set()}) == []
    assert circles({a: {b}, b: {c}, c: {b}}) == [["b", "c"]]
    assert circles({a: {a}, b: set()}) == [["a"]]


@pytest.mark.parametrize("path", FILES + KERNELS, ids=str)
def test_a_file_has_at_most_300_lines_of_code(path):
    assert code_lines(path.read_text()) <= 300


def test_code_lines_counts_code_only():
    assert (
        code_lines(
            '"""Doc."""\n\n# note\nx = 1\n\n\ndef f():\n    """Doc\n    more."""\n    return x\n'
        )
        == 3
    )


@pytest.mark.parametrize("path", FILES + KERNELS, ids=str)
def test_public_functions_and_classes_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    nodes = list(tree.body)
    nodes += [
        n for c in tree.body if isinstance(c, ast.ClassDef) and c.name[0] != "_" for n in c.body
    ]
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            inherited = node.name in {"forward", "extra_repr"}  # nn.Module's, documented there
            setter = any(isinstance(d, ast.Attribute) for d in node.decorator_list)
            assert inherited or setter or ast.get_docstring(node), (
                f"{path}: {node.name} has no docstring"
            )


def test_all_is_sorted_and_holds_every_public_name():
    names = minipeft.__all__
    assert names == sorted(
        names, key=lambda n: (n.isupper() is False, n[0].islower() or n[0] == "_", n)
    )
    modules = {part(path) for path in FILES} | {
        "torch",
        "jaxtyping",
    }  # the latter by the import hook
    public = {n for n in vars(minipeft) if not n.startswith("_") and n not in modules} | {
        "__version__"
    }
    assert public <= set(names)
    assert all(hasattr(minipeft, name) for name in names)


def test_the_kernel_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # `kernels` is somebody's package


def test_no_file_is_called_utils():
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "common"}]


def test_import_brings_in_nothing_optional():
    script = "import sys, minipeft; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    optional = {
        "triton",
        "transformers",
        "peft",
        "bitsandbytes",
        "safetensors",
        "matplotlib",
        "rich",
    }
    assert not optional & set(done.stdout.split())


def lines_of(path: str, *names: str) -> int:
    """Code lines of the named top-level functions and classes."""
    text = (ROOT / path).read_text()
    lines = text.splitlines(keepends=True)
    nodes = [n for n in ast.parse(text).body if getattr(n, "name", None) in names]
    assert len(nodes) == len(names)
    return sum(code_lines("".join(lines[n.lineno - 1 : n.end_lineno])) for n in nodes)


NUMBERED = ["lora", "inject", "nf4", "double_quant", "qlora", "prefix"]


def method_lines(path: str, owner: str, name: str) -> int:
    """Code lines of a method's body."""
    text = (ROOT / path).read_text()
    tree = ast.parse(text)
    (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    (found,) = [n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == name]
    body = text.splitlines(keepends=True)[found.body[0].lineno - 1 : found.end_lineno]
    return code_lines(textwrap.dedent("".join(body)))


def test_lines_of_the_numbered_files(capsys):
    """About 1,000 lines of code: one evening."""
    texts = {name: (ROOT / "minipeft" / f"{name}.py").read_text() for name in NUMBERED}
    counts = {name: (len(text.splitlines()), code_lines(text)) for name, text in texts.items()}
    shown = {
        "LoRALinear": lines_of("minipeft/lora.py", "LoRALinear"),
        "NF4 encode": lines_of("minipeft/nf4.py", "encode"),
        "NF4 decode": lines_of("minipeft/nf4.py", "decode"),
        "prefix_attention": lines_of("minipeft/prefix.py", "prefix_attention"),
        "LoRALinear.forward": method_lines("minipeft/lora.py", "LoRALinear", "forward"),
    }
    with capsys.disabled():
        print("\nlines (all, code):", counts, *(sum(c) for c in zip(*counts.values(), strict=True)))
        print("code lines:", shown)
    assert sum(code for _, code in counts.values()) <= 1200
    assert shown["LoRALinear.forward"] <= 5


def test_what_one_must_read(capsys):
    """The numbered files with all that they import, package `__init__` files left out."""
    edges = {path: files_imported(path.read_text()) for path in FILES}

    def closure(*names: str) -> tuple[int, int]:
        starts = [ROOT / "minipeft" / f"{name}.py" for name in names]
        files = {path for start in starts for path in {start, *below(start, edges)}}
        files = {path for path in files if path.name != "__init__.py"}
        return len(files), sum(len(path.read_text().splitlines()) for path in files)

    inject, all_six = closure("inject"), closure(*NUMBERED)
    with capsys.disabled():
        print(f"\ninject.py and all below it: {inject}; the six: {all_six} (files, lines)")
        print("lines of minipeft/:", sum(len(p.read_text().splitlines()) for p in FILES))
    assert inject[0] <= 8
    assert inject[1] <= 1600
    assert all_six[0] <= 13
    assert all_six[1] <= 3200
