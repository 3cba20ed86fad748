"""What the source may not contain: no way from a file to code, no network but `data get`."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "recurlm"
FILES = sorted(SOURCE.rglob("*.py"))

MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm", "yaml", "imp", "runpy", "code", "codeop",
    "subprocess", "multiprocessing", "pty", "socket", "socketserver", "ssl", "urllib", "http", "ftplib", "smtplib", "requests",
    "httpx", "aiohttp", "huggingface_hub", "transformers", "xmlrpc", "telnetlib", "webbrowser",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "globals", "locals", "vars", "breakpoint", "input"}
METHODS = {
    "torch.load", "torch.save", "torch.hub", "torch.jit", "torch.package", "torch.ops.load_library", "torch.classes.load_library",
    "numpy.load", "np.load", "np.save", "numpy.save", "importlib.import_module", "importlib.util", "os.system", "os.popen",
    "yaml.load", "json.loads", "sys.modules", "builtins", "ctypes",
}  # fmt: skip
ALLOWED = {
    ("text/corpora.py", "urllib", "_fetch"): "`recurlm data get`",
    ("text/corpora.py", "http", "_fetch"): "its errors",
    ("text/corpora.py", "json.loads", "_document"): "a line of a .jsonl text, of which only a string is taken",
    ("kernels/__init__.py", "importlib.util", "has_triton"): "whether triton is installed, by its literal name",
    ("kernels/nvrtc.py", "importlib.util", "missing"): "whether cuda-bindings is installed, by its literal name",
    ("provenance.py", "subprocess", ""): "git in our own checkout, for the commit",
    ("bench/pooling.py", "multiprocessing", ""): "its sweep compiles variants side by side, from its own code",
    ("bench/startup.py", "subprocess", ""): "Python and recurlm itself, to time their start",
    ("files.py", "json.loads", "parse_json"): "the strict reader that all other files go through",
    ("config.py", "json.loads", "to_dict"): "what json.dumps has just written",
    ("text/tokenizers/byte_level.py", "json.loads", "train"): "what the tokenizers library has just made",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


class Finder(ast.NodeVisitor):
    """Collects (what, where in the file) of everything that is not allowed without a reason."""

    def __init__(self) -> None:
        self.scope: list[str] = []
        self.found: list[tuple[str, str]] = []

    def add(self, what: str) -> None:
        self.found.append((what, ".".join(self.scope)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            if (top := name.name.split(".")[0]) in MODULES:
                self.add(top)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.split(".")[0] in MODULES:
            self.add(module.split(".")[0])
        for name in node.names:
            if f"{module}.{name.name}" in METHODS:
                self.add(f"{module}.{name.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (name := dotted(node)) in METHODS:
            self.add(name)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            if node.func.id in CALLS:
                self.add(node.func.id)
            if node.func.id in ("getattr", "setattr", "delattr") and not isinstance(node.args[1], ast.Constant):
                self.add(f"{node.func.id}({ast.unparse(node.args[0])}, a name that is not literal)")
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.add("assert")  # python -O leaves it out, so it guards nothing


GETATTR = {
    # Names from a literal table or from the dataclass itself, looked up after they were found there.
    ("__init__.py", "getattr(config, a name that is not literal)", "__getattr__"),
    ("__init__.py", "getattr(api, a name that is not literal)", "__getattr__"),
    ("config.py", "getattr(base, a name that is not literal)", "from_dict"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_way_from_a_file_to_code(path: Path):
    finder = Finder()
    finder.visit(ast.parse(path.read_text(encoding="utf-8")))
    name = path.relative_to(SOURCE).as_posix()
    left = [(what, where) for what, where in finder.found if (name, what, where) not in ALLOWED.keys() | GETATTR]
    assert not left


def test_the_finder_finds():
    source = "import pickle\nfrom torch import load\nx = eval('1')\ny = torch.load('a')\nassert y\ngetattr(x, y)\n"
    finder = Finder()
    finder.visit(ast.parse(source))
    assert [what.split("(")[0] for what, _ in finder.found] == [
        "pickle",
        "torch.load",
        "eval",
        "torch.load",
        "assert",
        "getattr",
    ]


def test_the_lazy_names_of_the_package_are_literal():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    tests = [node for node in ast.walk(function) if isinstance(node, ast.Compare)]
    assert tests and all(isinstance(test.ops[0], ast.In | ast.Eq | ast.NotIn) for test in tests)
