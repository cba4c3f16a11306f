"""Import what defines environments: a Python file by its path, or a module by its name."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import gymnasium

from rlfeed.errors import EnvMakeError, EnvNotFoundError, suggest

_OURS = (str(Path(__file__).parents[1]), str(Path(gymnasium.__file__).parent), "<frozen importlib")
_FILE_MODULE = "rlfeed_file_"


def load_file(path: str) -> ModuleType:
    """Import a Python file by its path, under a name that is the same in every process.

    Args:
        path: The file.

    Returns:
        The module; the same one when asked again.

    Raises:
        EnvNotFoundError: If there is no such file.
        EnvMakeError: If importing it raised.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        folder = file.parent
        near = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
        what = f"{folder} holds no file of that name" if folder.is_dir() else f"the folder {folder} does not exist"
        raise EnvNotFoundError(f"{path}: {what}; expected a Python file.{suggest(file.name, near)}")
    name = f"{_FILE_MODULE}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise EnvNotFoundError(f"{path}: cannot be imported; expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))  # as `python file.py` does: the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a guard may call sys.exit
        del sys.modules[name]
        raise EnvMakeError(_import_failed(path, error)) from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def loaded_files() -> tuple[str, ...]:
    """List the files that `load_file` has imported in this process.

    Returns:
        Their paths, in the order of their imports.
    """
    return tuple(str(module.__file__) for name, module in sys.modules.items() if name.startswith(_FILE_MODULE))


def import_module(name: str) -> ModuleType:
    """Import a module by its name.

    Args:
        name: Such as ``package.module``.

    Returns:
        The module.

    Raises:
        EnvNotFoundError: If there is no such module.
        EnvMakeError: If importing it raised.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise EnvNotFoundError(
                f"{name}: there is no module {error.name!r}; expected an importable module. Install it, set "
                "PYTHONPATH, or give the file as path/to/file.py:ClassName."
            ) from None
        raise EnvMakeError(_import_failed(name, error)) from error
    except Exception as error:
        raise EnvMakeError(_import_failed(name, error)) from error


def own_traceback(error: BaseException) -> str:
    """Format a traceback without the frames of rlfeed, Gymnasium and the import machinery.

    Args:
        error: What user code raised.

    Returns:
        The traceback, from the user's code on; whole where nothing of it is left.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_OURS)]
    lines = traceback.format_list(own or frames) + traceback.format_exception_only(error)
    return "Traceback (most recent call last):\n" + "".join(lines).rstrip()


def _import_failed(place: str, error: BaseException) -> str:
    return (
        f"{place}: importing it raised {type(error).__name__}; expected a module that imports. "
        f"This is its own traceback:\n{own_traceback(error)}"
    )
