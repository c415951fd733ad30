"""Libraries that only some exports need: installed as extras, imported when first used."""

import importlib
import importlib.util
from typing import Any

from secateur.errors import ExportError
from secateur.export._parity import first_line
from secateur.export._program import quiet


def check_extra(library: str) -> None:
    """Refuse to go on without an optional library; nothing is imported.

    Args:
        library: Its name, which is also that of the extra.

    Raises:
        ExportError: If it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec(library) is None:
        raise ExportError(
            f"This format must have {library}, which is not installed. Run: pip install 'secateur[{library}]'"
        )


def extra(module: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: Such as ``executorch.exir``; its first part names the library and the extra.

    Raises:
        ExportError: If the library is not installed, or does not work with what else is.
    """
    library = module.split(".", maxsplit=1)[0]
    check_extra(library)
    try:
        with quiet():
            return importlib.import_module(module)
    except (ImportError, OSError, AttributeError) as error:
        raise ExportError(
            f"{library} must fit the other packages; {module} cannot be imported ({first_line(error)}) "
            f"Run: pip install --upgrade 'secateur[{library}]'"
        ) from error
