"""Finds the models and recipes of the repository: in the repository, or in the current folder."""

from pathlib import Path

import specjax
from specjax.checkpoint.fetched import model_path

REPOSITORY = Path(specjax.__file__).resolve().parent.parent  # right for an installation in place, `pip install -e .`


def shipped(name: str) -> Path | None:
    """Returns the folder of a shipped checkpoint, or None if it is in neither place."""
    folders = [place / "checkpoints" / name for place in (REPOSITORY, Path.cwd())]
    return next((folder for folder in folders if folder.is_dir()), None)


def folder_or_shipped(given: Path | None, name: str = "py-14m", option: str = "--target") -> Path:
    """Returns the folder or file that an option names, or the shipped model's folder if the option is not given.

    Raises:
      ValueError: the option is not given, and the shipped model is in neither place; or the option names a model that
        was not fetched.
    """
    folder = shipped(name) if given is None else model_path(given)
    if folder is None:
        raise ValueError(
            f"{option} is not given, and the shipped checkpoints/{name} is neither in the current folder nor in a "
            f"repository from which specjax is installed in place; give {option} DIR"
        )
    return folder


def recipe_folder(given: Path) -> Path:
    """Returns a recipe's folder: the path itself, or the same path in the repository, such as ``models/py-14m``.

    A folder without a recipe is returned as it is: reading it is the error.
    """
    folders = (given, REPOSITORY / given)
    return next((folder for folder in folders if (folder / "recipe.toml").is_file()), given)
