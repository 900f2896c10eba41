"""Finding trainers and planners by name, as nnU-Net does."""

from pathlib import Path
from typing import Any

from nnunetv2.utilities.find_class_by_name import recursive_find_python_class


def find_class(name: str, folder: Path, parent: type, package: str | None = None) -> Any:
    """A class in one of the Python files of a folder.

    Args:
        name: of the class.
        folder: where to look.
        parent: what the class must be derived from; others of that name are not found.
        package: that the folder is; None if its files are no package.

    Returns:
        The class, or None.
    """
    options = {} if package else {"base_folder": str(folder), "cleanup_imports_from_base_folder": True}
    found = recursive_find_python_class(str(folder), name, package, **options)
    return found if isinstance(found, type) and issubclass(found, parent) else None
