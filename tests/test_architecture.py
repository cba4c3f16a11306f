"""The rules of the house that no other tool holds."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted(path for folder in ("rlfeed", "agents", "scripts") for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in CODE if path.is_relative_to(ROOT / "rlfeed")]
PACKAGES = [path for path in LIBRARY if path.name == "__init__.py"]

BASE = {"errors", "nest", "layout", "ragged", "types", "specs", "codec", "durable", "processes", "memory", "messages"}
LAYERS = {  # who may import whom, beside itself
    "errors": set(),
    "nest": {"errors"},
    "layout": {"errors", "nest"},
    "ragged": {"errors", "nest", "layout"},
    "types": {"errors", "nest", "layout", "ragged"},
    "specs": {"errors", "nest", "types"},
    "returns": {"errors", "nest", "types"},
    "codec": {"errors", "nest", "types", "specs"},
    "durable": BASE - {"durable", "processes", "memory", "messages"},
    "processes": {"errors"},
    "memory": {"errors"},
    "messages": set(),
    "envs": BASE,
    "rollout": BASE | {"envs"},
    "replay": BASE,
    "feed": BASE | {"replay"},
    "log": {"errors", "types"},
    "train": BASE | {"returns", "envs", "rollout", "replay", "feed", "log"},
    "rlfeed": BASE | {"returns", "envs", "rollout", "replay", "feed", "log", "train"},
    "testing": BASE | {"returns", "envs", "rollout", "replay", "feed", "log", "train", "rlfeed"},
    "agents": BASE | {"returns", "envs", "rollout", "replay", "feed", "log", "train", "rlfeed"},
    "scripts": BASE | {"returns", "envs", "rollout", "replay", "feed", "log", "train", "rlfeed", "agents"},
}
GYMNASIUM = {"specs", "envs", "rollout", "train", "testing", "agents", "scripts"}
REFUSED_NAMES = {
    "done", "dones", "timestep", "timesteps", "num_timesteps", "n_envs", "hidden", "segment", "segments", "chunk",
    "chunks",
}  # fmt: skip
GLOBAL_DRAWS = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}
GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.cuda.manual_seed_all"}
OWN_GENERATORS = {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}


def parse(path):
    return ast.parse(path.read_text(), str(path))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module):
    """Name the layer of a module: ``rlfeed.replay.buffer`` is in replay."""
    parts = module.split(".")
    return parts[1] if parts[0] == "rlfeed" and len(parts) > 1 else parts[0]


def imports(tree):
    """Name what a module imports, wherever in it: for ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(path):
    """Name the project's modules that a module imports, as precisely as it says."""
    named = {name for name in imports(parse(path)) if name in MODULES}
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)} - {module_of(path)}


def imports_package(tree, package):
    return any(name.split(".")[0] == package for name in imports(tree))


def dotted(node):
    """Print ``np.random.seed`` as it is written, or nothing where it is no such name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (value := dotted(node.value)):
        return f"{value}.{node.attr}"
    return ""


MODULES = {module_of(path) for path in CODE}


# Rules on one module: each gives the offending lines.


def asserts(tree):
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def calls_of(*names):
    def offences(tree):
        return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) in names]

    return offences


def future_imports(tree):
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]


def unsafe_loading(tree):
    offences = calls_of("eval", "exec", "np.load", "np.save", "np.savez", "torch.load", "torch.save")(tree)
    return offences + [0] * any(imports_package(tree, name) for name in ("pickle", "dill", "cloudpickle", "marshal"))


def global_randomness(tree):
    offences = [0] * imports_package(tree, "random")
    for node in ast.walk(tree):
        name = dotted(node)
        group, _, last = name.rpartition(".")
        if group in ("np.random", "numpy.random") and last not in OWN_GENERATORS:
            offences.append(node.lineno)
        if name in GLOBAL_SEEDS:
            offences.append(node.lineno)
        if isinstance(node, ast.Call):
            group, _, last = dotted(node.func).rpartition(".")
            if group == "torch" and last in GLOBAL_DRAWS and "generator" not in {k.arg for k in node.keywords}:
                offences.append(node.lineno)
    return offences


def refused_names(tree):
    offences = []
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in REFUSED_NAMES
        argument = isinstance(node, ast.arg) and node.arg in REFUSED_NAMES
        defined = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in REFUSED_NAMES
        if stored or argument or defined:
            offences.append(node.lineno)
    return offences


def undocumented(tree):
    """Find public functions, methods and classes whose docstring lacks a parameter.

    "See `X`" hands over to the contract that has them.
    """
    offences = []
    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list):
                    continue  # its getter is described
                text = ast.get_docstring(node) or ""
                described = re.findall(r"^ {4}\*{0,2}(\w+):", text, re.MULTILINE)
                missing = [name for name in parameters(node) if name not in described]
                if not text or (missing and "see `" not in text.casefold()):
                    offences.append((node.lineno, node.name, missing))
    return offences


def parameters(node):
    if isinstance(node, ast.ClassDef):
        constructor = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if constructor is not None:
            return parameters(constructor)
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return []
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and "init=False" not in ast.unparse(f)]
        return [f.target.id for f in fields if "ClassVar" not in ast.unparse(f.annotation)]
    if ast.get_docstring(node) and len(node.body) == 1:
        return []  # a docstring alone does nothing with them
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return [a.arg for a in every if a is not None and a.arg not in ("self", "cls") and not a.arg.startswith("_")]


RULES = {
    "assert": (asserts, "assert x > 0"),
    "print": (calls_of("print", "breakpoint"), "print('x')"),
    "wall clock": (calls_of("time.time", "datetime.now", "datetime.datetime.now"), "start = time.time()"),
    "future import": (future_imports, "from __future__ import annotations"),
    "unsafe loading": (unsafe_loading, "state = torch.load(path)"),
    "global randomness": (global_randomness, "np.random.seed(0)"),
    "refused name": (refused_names, "done = True"),
    "undocumented": (undocumented, "def f(x):\n    '''Do it.'''\n    return x"),
}

# Where a rule does not hold, and why.
EXCEPTIONS = {
    ("unsafe loading", "rlfeed/feed/workers.py"): "between our own live processes",
    ("global randomness", "rlfeed/feed/seeding.py"): "seeds what users' transforms use, and puts it back",
    ("global randomness", "rlfeed/envs/checks/world.py"): "sees whether an environment draws from it",
    ("global randomness", "rlfeed/testing/broken.py"): "environments that do what they should not",
}


def bound_by(rule, paths):
    return [path for path in paths if (rule, str(path.relative_to(ROOT))) not in EXCEPTIONS]


@pytest.mark.parametrize("rule", RULES)
def test_library_keeps_the_rule(rule):
    find, _ = RULES[rule]
    # Kernels are inside: what their arguments are, which all of them share, their modules say.
    paths = [path for path in bound_by(rule, LIBRARY) if rule != "undocumented" or path.parent.name != "kernels"]
    offences = {str(path.relative_to(ROOT)): found for path in paths if (found := find(parse(path)))}

    assert offences == {}


@pytest.mark.parametrize("rule", ["future import", "unsafe loading", "refused name"])
def test_agents_and_scripts_keep_the_rule(rule):
    find, _ = RULES[rule]
    offences = {str(path.relative_to(ROOT)): found for path in bound_by(rule, CODE) if (found := find(parse(path)))}

    assert offences == {}


@pytest.mark.parametrize("rule", RULES)
def test_rule_offender_is_found(rule):
    find, offender = RULES[rule]

    assert find(ast.parse(offender))


@pytest.mark.parametrize(
    ("offender", "find"),
    [
        ("import random", global_randomness),
        ("from numpy import random\nx = numpy.random.rand(3)", global_randomness),
        ("x = torch.randn(3, device=d)", global_randomness),
        ("torch.manual_seed(0)", global_randomness),
        ("import pickle", unsafe_loading),
        ("def f(hidden): ...", refused_names),
        ("for chunk in x: ...", refused_names),
        ("class A:\n    '''Do it.'''\n    def f(self):\n        return 1", undocumented),
        ("class A:\n    '''Do it.'''\n    def __init__(self, x): ...", undocumented),
        ("def f(x):\n    return x", undocumented),
        ("@dataclass\nclass A:\n    '''Hold it.'''\n    x: int", undocumented),
    ],
)
def test_rule_other_offender_is_found(offender, find):
    assert find(ast.parse(offender))


def test_rules_what_is_allowed_is_not_found():
    allowed = inspect.cleandoc("""
        generator = np.random.Generator(np.random.Philox(key=7))
        noise = torch.rand(3, generator=g)
        g = torch.Generator().manual_seed(0)
        finished = future.done()
        def f(x):
            '''Do it.

            Args:
                x: What.
            '''
    """)

    assert [name for name, (find, _) in RULES.items() if find(ast.parse(allowed))] == []


def test_layers_every_import_goes_down():
    upward = [
        f"{module_of(path)} imports {name}"
        for path in CODE
        for name in project_imports(path)
        if unit_of(name) != (unit := unit_of(module_of(path))) and unit_of(name) not in LAYERS.get(unit, set())
    ]

    assert upward == []


def test_layers_every_module_has_one():
    assert {unit_of(module) for module in MODULES} <= set(LAYERS)


def test_modules_import_each_other_without_cycles():
    graph = {module_of(path): project_imports(path) for path in CODE}
    for module in MODULES:  # an import of a module runs its packages first, except where a package lists its own
        package = module.rpartition(".")[0]
        if package in graph and not any(name.startswith(f"{package}.") for name in graph[package]):
            graph[module] = graph[module] | {package}

    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("tyro", lambda path: unit_of(module_of(path)) == "scripts"),
        ("argparse", lambda path: unit_of(module_of(path)) == "scripts"),
        ("numba", lambda path: module_of(path).startswith("rlfeed.replay.kernels")),
        ("gymnasium", lambda path: unit_of(module_of(path)) in GYMNASIUM),
        ("tensorboard", lambda path: False),
    ],
)
def test_package_is_imported_only_where_it_belongs(package, allowed):
    assert [str(path) for path in CODE if imports_package(parse(path), package) and not allowed(path)] == []


def test_gymnasium_in_specs_is_imported_only_inside_functions():
    tree = parse(ROOT / "rlfeed" / "specs.py")
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])

    assert imports_package(tree, "gymnasium")
    assert not imports_package(top, "gymnasium")


def test_data_path_without_gymnasium_can_be_imported():
    code = "import sys; sys.modules['gymnasium'] = None; import rlfeed.replay, rlfeed.feed, rlfeed.durable"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PACKAGES, ids=module_of)
def test_package_exports_are_sorted_and_complete(path):
    tree = parse(path)
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "__all__"
    ]
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rlfeed")
        for alias in node.names
    }

    names = exported[0] if exported else []
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert {name for name in imported if not name.startswith("_")} <= set(names)


def test_every_folder_of_the_library_is_a_package_that_is_installed():
    folders = {path.parent for path in LIBRARY}
    listed = set(re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1].split(", "))

    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert listed == {f'"{folder.relative_to(ROOT).as_posix().replace("/", ".")}"' for folder in folders}


def test_no_file_is_longer_than_500_lines():
    paths = [*CODE, *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}

    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_constraints_pin_every_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    required = set(re.findall(r'^\s*"([A-Za-z][\w-]*)(?:\[\w+\])?>=', text, re.MULTILINE)) | {"tyro"}
    pins = (ROOT / "constraints.txt").read_text().lower().splitlines()

    assert {"torch", "pytest", "numba", "pyright"} <= required
    assert [name for name in required if not any(pin.startswith(f"{name.lower()}==") for pin in pins)] == []
