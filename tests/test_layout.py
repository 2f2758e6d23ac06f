"""How the repository is laid out: who imports whom, what is ours below the root, utils.py alone."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demos import printed, start_code
from helpers import copy_of_tree, outcome, planted_basis, planted_pairs, planted_weights
from layout import (
    DATA_SETS,
    ROOT,
    files_of_tests,
    import_folders,
    paths_of_others,
    product_files,
)

SITE_PACKAGES = ROOT / ".venv" / "lib" / "python3.11" / "site-packages"

# ---- Who imports whom


def imported_modules(path: Path) -> set[str]:
    """The full names that a file imports, such as "lore.files", also inside functions.

    `from lore import files` gives "lore.files", and `from lore.files import save_json` gives
    "lore.files.save_json".
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(names: set[str]) -> set[str]:
    """The first parts of dotted names."""
    return {name.split(".")[0] for name in names}


def strings_in(path: Path) -> list[str]:
    """The strings in a file that are not docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr):
                docstrings.add(first.value)
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [
        node.value for node in constants if isinstance(node.value, str) and node not in docstrings
    ]


def test_nothing_outside_the_tests_imports_from_them_or_names_them():
    modules_of_tests = {path.stem for path in files_of_tests()} | {"tests"}
    for path in product_files():
        assert not top_level(imported_modules(path)) & modules_of_tests, path
        assert not any(re.search(r"\btests\b", text) for text in strings_in(path)), path


def test_utils_imports_four_libraries_and_the_standard_library_and_nothing_else():
    allowed = {"torch", "numpy", "numba", "tqdm"} | sys.stdlib_module_names
    assert top_level(imported_modules(ROOT / "utils.py")) <= allowed


def test_lore_imports_utils_and_no_data_set_and_no_data_set_imports_another():
    ours = {path.stem for path in product_files() if path.parent.name != "lore"} | {"lore"}
    for path in product_files():
        folder = path.parent.name
        if path == ROOT / "utils.py":
            allowed = set()
        elif folder == "lore":
            allowed = {"utils", "lore"}
        else:
            allowed = {"utils", "lore", *modules_before(path.stem, DATA_SETS[folder])}
        assert top_level(imported_modules(path)) & ours <= allowed, path


def modules_before(module: str, modules: list[str]) -> list[str]:
    """Those before it in the list; all if it is not in there, such as a script."""
    return modules[: modules.index(module)] if module in modules else modules


def test_modules_of_lore_import_one_another_in_one_direction():
    modules = {path.stem: path for path in product_files() if path.parent.name == "lore"}
    assert "files" in modules
    imports = {}
    for module, path in modules.items():
        of_lore = [name for name in imported_modules(path) if name.startswith("lore.")]
        imports[module] = {name.split(".")[1] for name in of_lore} & set(modules)
    assert "files" in imports["embedding"]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle


def test_no_file_of_the_product_has_a_star_import():
    for path in product_files():
        assert not any(name.endswith(".*") for name in imported_modules(path)), path


def test_utils_names_no_data_set():
    """Except in the public names of the released scripts."""
    source = (ROOT / "utils.py").read_text()
    source = re.sub(r"\bcreate_dataset_prism(_shots)?\b", "", source)
    names = (
        r"tldr|tl;dr|reddit|prism|personal_?llm|reward.?bench|skywork|summarize_from|namkoong|"
        r"hannahrose|allenai"
    )
    assert re.findall(f".*(?:{names}).*", source, re.IGNORECASE) == []


# ---- What is ours below the root


def test_only_the_folders_of_our_modules_are_dropped_from_a_path():
    """A virtual environment may lie below the root, and a folder beside it may begin like it."""
    others = [str(SITE_PACKAGES), f"{ROOT}-of-others", "/usr/lib/python311.zip"]
    ours = [str(folder) for folder in import_folders()]
    assert len(ours) == len(DATA_SETS) + 2
    assert paths_of_others([*ours, *others, f"{ROOT}/tests/../tests/"]) == others


def test_a_script_in_a_process_of_its_own_keeps_an_environment_below_the_root(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "path", [*sys.path, str(SITE_PACKAGES)])
    path = printed(start_code("import sys; print(*sys.path, sep='\\n')", tmp_path)).splitlines()
    assert path[0] == str(tmp_path)
    assert str(SITE_PACKAGES) in path
    assert not {str(folder) for folder in import_folders()} & set(path)


def test_what_else_lies_in_a_checkout_is_neither_product_nor_test_nor_copied(tmp_path):
    checkout = copy_of_tree(tmp_path / "checkout")
    product = product_files(checkout)
    copied = files_below(checkout)
    assert [path.relative_to(checkout) for path in product] == [
        path.relative_to(ROOT) for path in product_files()
    ]
    for name in (
        ".venv/lib/python3.11/site-packages/torch/storage.py",
        "venv/lib/python3.11/site-packages/torch/storage.py",
        "tests/.venv/lib/python3.11/site-packages/torch/storage.py",
        "PRISM/.venv/lib/python3.11/site-packages/torch/storage.py",
        "PRISM/data/prism/train.parquet",
        "PRISM/train_embeddings.pkl",
        "RedditTLDR/results/report.md",
        "RedditTLDR/.embedding_cache/a/b.safetensors",
        "mine/results/report.md",
        "mine.py",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    assert product_files(checkout) == product
    assert files_of_tests(checkout) == []
    assert files_below(copy_of_tree(tmp_path / "copy", checkout)) == copied


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- utils.py alone

ALONE = """
from utils import *
import os, sys
assert os.path.samefile(sys.modules["utils"].__file__, "utils.py")

K_list, iterations, seed = [0, 1, 2], 500, 0
users = torch.load(sys.argv[1], weights_only=True)
train, test, train_unseen, test_unseen = users["features"]
accuracies = run(
    K_list, [0], users["V_final"], train, test, train_unseen, test_unseen,
    len(train), len(train_unseen), torch.device("cpu"), seed=seed, num_iterations=iterations,
)
models = {0: (users["V_final"], torch.ones(len(train), 1), torch.ones(len(train_unseen), 1))}
for K in K_list[1:]:
    W, V = solve(train, K, iterations, 0.5, seed=seed)
    W_unseen = learn_multiple_few_shot(train_unseen, V, 500, 0.1, seed=seed)
    models[K] = V, W, torch.stack(W_unseen)
torch.save({"models": models, "accuracies": [torch.tensor(a) for a in accuracies]}, sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] == "lore"]
"""


def float64_accuracy(features: list[torch.Tensor], V: torch.Tensor, W: torch.Tensor) -> float:
    """Mean over users of the share of pairs with a positive margin x V w, one pair at a time."""
    shares = []
    for X, w in zip(features, W, strict=True):
        reward = V.double() @ w.double()
        margins = [float(x.double() @ reward) for x in X]
        shares.append(sum(margin > 0 for margin in margins) / len(margins))
    return sum(shares) / len(shares)


def test_utils_copied_alone_into_an_empty_folder_trains_and_evaluates(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "utils.py").write_bytes((ROOT / "utils.py").read_bytes())
    d, K, N, N_unseen, pairs = 8, 2, 12, 8, 40
    V, W = planted_basis(d, K), planted_weights(N + N_unseen, K)
    train, test = (planted_pairs(V, W, pairs, seed) for seed in (1, 2))
    features = [train[:N], test[:N], train[N:], test[N:]]
    V_final = torch.randn(d, 1, generator=torch.Generator().manual_seed(3))
    torch.save({"features": features, "V_final": V_final}, tmp_path / "users.pt")
    search_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, tmp_path / "users.pt", tmp_path / "models.pt"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths_of_others(search_path)),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    status, out, err = outcome(process)
    assert status == 0, err
    assert [line for line in out.splitlines() if line.startswith("K :")] == [
        "K : 0",
        "K : 1",
        "K : 2",
    ]

    found = torch.load(tmp_path / "models.pt", weights_only=True)
    for rank, (V, W, W_unseen) in found["models"].items():
        assert V.shape == (d, max(rank, 1))
        for setting, weights in enumerate([W, W, W_unseen, W_unseen]):
            expected = float64_accuracy(features[setting], V, weights)
            one_pair = 1 / (len(weights) * pairs)  # rounding may turn a margin that is nearly 0
            measured = float(found["accuracies"][setting][rank])
            assert measured == pytest.approx(expected, abs=1.01 * one_pair), (rank, setting)
    reference, pooled, personal = found["accuracies"][3]  # unseen users, unseen pairs
    assert reference < 0.6
    assert personal > 0.85
    assert personal > pooled + 0.1
