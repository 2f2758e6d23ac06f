"""Which files and folders below the root are the repository's own.

Other things may lie there too, such as a virtual environment or results of somebody's runs.
This module imports none of ours, because conftest.py needs it before they can be imported.
"""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Folder of each data set -> the modules in it that its scripts import. Each imports only modules
# before it.
DATA_SETS = {
    "RedditTLDR": ["tldr"],
    "PRISM": ["prism"],
    "PersonalLLM": ["personalllm"],
    "OwnData": ["own_rows", "own_reading", "own_split", "own_files", "own_data"],
}


def import_folders(root: Path = ROOT) -> list[Path]:
    """The folders that hold modules of ours: the tests put them on `sys.path`."""
    return [*(root / name for name in DATA_SETS), root, root / "tests"]


def paths_of_others(paths: Iterable[str], root: Path = ROOT) -> list[str]:
    """The entries of a `sys.path` that are not ours, such as those of a `.venv` below the root."""
    ours = {folder.resolve() for folder in import_folders(root)}
    return [path for path in paths if Path(path).resolve() not in ours]


def product_files(root: Path = ROOT) -> list[Path]:
    """The Python files of the product: utils.py, lore/ and the folders of the data sets."""
    folders = [root / "lore", *(root / name for name in DATA_SETS)]
    return [root / "utils.py", *(path for f in folders for path in sorted(f.glob("*.py")))]


def files_of_tests(root: Path = ROOT) -> list[Path]:
    """The Python files of the tests and benchmarks."""
    folders = [root / "tests", root / "tests" / "benchmarks"]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]
