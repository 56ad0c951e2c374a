"""What differs where the package is imported from a checkout instead of from an installation.

In a checkout ``kernels/`` and ``benchmarks/`` lie beside ``fastadapter/``; an installation has them inside it. Python
puts its current folder before the installed packages, so after a plain ``pip install .`` whoever starts it in the
checkout imports these sources, without the extension that was built for the installed copy. Standard library only:
``setup.py`` runs this file where torch may be absent.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
EXTENSION = "_C.abi3.so"
BUILD_INFO = "_build_info.json"


def checkout() -> Path | None:
    """The root of the checkout that this package is imported from; ``None``: it is an installed one."""
    root = PACKAGE.parent
    inside = (PACKAGE / "kernels").is_dir()
    return root if not inside and (root / "kernels" / "__init__.py").is_file() else None


def source_digest(root: Path) -> str:
    """SHA-256 over the names and contents of ``csrc/``: which sources an extension was built from."""
    state = hashlib.sha256()
    for path in sorted(path for path in (root / "csrc").iterdir() if path.is_file()):
        state.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def build_info(folder: Path = PACKAGE) -> dict[str, Any]:
    """What ``setup.py`` recorded in this package folder; empty where it never ran."""
    try:
        return json.loads((folder / BUILD_INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def extension_folder(search: Iterable[str] | None = None) -> tuple[Path, str]:
    """The package folder whose extension is the one to load, and, where there is none, why.

    Its own first. A checkout that was never built in place takes that of the installed copy if it was built from the
    same ``csrc/``: other sources may mean other arguments under the same name.

    Args:
        search: folders where an installed copy may be; by default those that Python searches.
    """
    root = checkout()
    if (PACKAGE / EXTENSION).is_file():
        return PACKAGE, ""
    if root is None or (PACKAGE / BUILD_INFO).is_file():
        return PACKAGE, "the package was installed without it (see `fastadapter doctor`)"
    here = f"these are the sources in {root}, never built in place"
    for entry in sys.path if search is None else search:
        folder = Path(entry, "fastadapter").resolve()
        if folder == PACKAGE or not (folder / BUILD_INFO).is_file():
            continue
        info = build_info(folder)
        if not info.get("extension"):
            return folder, f"{here}, and the copy in {folder} was installed without it"
        if info.get("sources") != source_digest(root):
            return folder, f"{here}, and the copy in {folder} was built from others: pip install . again"
        return folder, ""
    return PACKAGE, f"{here}, and no copy is installed: pip install . builds it"
