"""How the code is laid out: which module may import which, and how long a file may be."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastopt"
ADAPTERS = {"fastopt.torch", "fastopt.keras", "fastopt.mpi", "fastopt._pytorch"}
COMMANDS = {"fastopt.compare", "fastopt.bench"}

pytestmark = pytest.mark.skipif(not (ROOT / "src_c").is_dir(), reason="there are no sources here")


# ---- imports -------------------------------------------------------------------------------------


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of_cython(path):
    """Return the lines of a compiled module, and of what it includes, that import from fastopt."""
    text = path.read_text()
    lines = re.findall(r"^[ \t]*((?:import|from) fastopt.*)$", text, re.MULTILINE)
    found = [line for line in lines if " cimport " not in line]
    for included in re.findall(r'^include "(.*)"$', text, re.MULTILINE):
        found.append(imports_of_cython(path.parent / included))
    return "\n".join(found)


SOURCES = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
SOURCES |= {module_name(path): imports_of_cython(path) for path in PACKAGE.rglob("*.pyx")}


def imports(name, source, modules):
    """Return the modules that a module imports: at its head, in functions, and for types alone.

    To import a submodule runs its packages first. That is not counted for a package that the module
    itself lies in, which is being imported already, unless the module asks for one of its names.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            asked = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            asked = set()
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                asked.add(full if full in modules else node.module)
        else:
            continue
        for full in asked & modules:
            found.add(full)
            parents = full.split(".")[:-1]
            outer = {".".join(parents[: i + 1]) for i in range(len(parents))}
            found |= {package for package in outer if not name.startswith(f"{package}.")}
    return found - {name}


def circles(arrows):
    """Return the circles that a search from each module finds: none if there is none."""
    found, state = [], {}

    def visit(name, path):
        state[name] = "open"
        for other in sorted(arrows[name]):
            if state.get(other) == "open":
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[name] = "done"

    for name in sorted(arrows):
        if name not in state:
            visit(name, [name])
    return found


def graph(sources):
    return {name: imports(name, source, sources.keys()) for name, source in sources.items()}


ARROWS = graph(SOURCES)


def test_no_modules_import_one_another_in_a_circle():
    assert {"fastopt.optimizer", "fastopt.bench.run", "fastopt.keras._step"} <= ARROWS.keys()
    assert "fastopt.checkpoint" in ARROWS["fastopt.optimizer"]  # within a function
    # What imports fastopt itself stands above all that fastopt's own namespace is made of.
    assert circles(ARROWS) == []


def within(name, packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def test_adapters_and_commands_import_fastopt_and_never_the_reverse():
    above = ADAPTERS | COMMANDS
    crossing = {
        (name, other)
        for name, others in ARROWS.items()
        for other in others
        if within(other, above) and not within(name, above)
    }
    assert {name for name, _ in crossing} == {"fastopt.__main__"}  # which chooses a command
    assert not any(within(other, ADAPTERS) for _, other in crossing)
    assert not any(
        within(other, COMMANDS)
        for name, others in ARROWS.items()
        if within(name, ADAPTERS)
        for other in others
    )


@pytest.mark.parametrize(
    "reverse",
    [
        "from fastopt.b import x",
        "import fastopt.b",
        "from fastopt import b",
        "def later():\n    from fastopt.b import x",
        "if TYPE_CHECKING:\n    from fastopt.b import X",
    ],
)
def test_every_way_to_import_is_seen(reverse):
    sources = {"fastopt": "from fastopt import a", "fastopt.a": reverse, "fastopt.b": ""}
    assert circles(graph(sources)) == []
    sources["fastopt.b"] = "from fastopt.a import y"
    assert circles(graph(sources)) == [["fastopt.a", "fastopt.b", "fastopt.a"]]
    sources["fastopt.b"] = "import fastopt"
    assert len(circles(graph(sources))) == 1


# ---- how long a file is --------------------------------------------------------------------------

LONGEST = 500  # lines of code: not blank, no comment, no docstring
SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".c", ".h", ".inc", ".def"}

C_TOKENS = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def lines_of_c(text):
    """Count lines of C that hold anything but a comment."""

    def blanked(match):
        found = match[0]
        return "\n" * found.count("\n") if found.startswith("/") else found

    return sum(bool(line.strip()) for line in C_TOKENS.sub(blanked, text).splitlines())


def lines_of_python(text):
    """Count lines of Python or Cython that hold anything but a comment or a docstring.

    A docstring is a string that begins a line that nothing else begins or ends.
    """
    beside_code = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
    }
    code, statement = set(), []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in beside_code and token.type != tokenize.ENDMARKER:
            statement.append(token)
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if any(part.type != tokenize.STRING for part in statement):
                code.update(*(range(part.start[0], part.end[0] + 1) for part in statement))
            statement = []
    return len(code)


def test_no_file_is_longer_than_one_subject_needs():
    found = {
        path.relative_to(ROOT).as_posix(): path
        for folder in (PACKAGE, ROOT / "src_c")
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
    }
    python = {".py", ".pyi", ".pyx", ".pxd", ".pxi"}
    lengths = {
        name: (lines_of_python if path.suffix in python else lines_of_c)(path.read_text())
        for name, path in found.items()
        if not path.with_suffix(".pyx").exists() or path.suffix != ".c"  # which Cython has written
    }
    assert len(lengths) > 80
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_docstrings_comments_and_blank_lines_are_not_counted():
    python = (
        '"""What\nit is."""\n\nimport os  # here\n# there\n\n\ndef f(a,\n    b):\n    """Say."""\n'
    )
    python += '    return """two\n    lines"""\n'
    assert lines_of_python(python) == 1 + 2 + 2
    c = '/* What\n it is. */\n\nint a; // here\n  // there\nchar *b = "/* no";\nint c; /* and\n*/\n'
    assert lines_of_c(c) == 3
