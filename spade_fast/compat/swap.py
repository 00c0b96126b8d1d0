"""`accelerate`, which replaces the published solver classes in modules that imported them."""

from __future__ import annotations

from types import ModuleType

from spade_fast.compat.sparsegpt_solvers import SparseGPT, SparseGPTSuperFast
from spade_fast.compat.trueobs import TrueOBS

_REPLACEMENTS: dict[str, type] = {cls.__name__: cls for cls in (TrueOBS, SparseGPT, SparseGPTSuperFast)}


def accelerate(*modules: ModuleType) -> list[str]:
    """Replace the published solver classes in the namespaces of the given modules.

    Every module-level name that refers to a class called ``TrueOBS``, ``SparseGPT`` or ``SparseGPTSuperFast`` (even if
    the name differs, as after ``import … as …``) is rebound to the class of that name in :mod:`spade_fast.compat`.
    Existing objects keep their class. Further calls on the same module have no effect.

    Parameters
    ----------
    *modules : module
        One or more modules whose code creates solver objects. The module of a script is ``sys.modules["__main__"]``.

    Returns
    -------
    list of str
        The replaced names, each as ``"module.name"``.

    Raises
    ------
    TypeError
        An argument is not a module.
    ValueError
        No module was given, or a module has none of the three classes; no module is then changed.

    Examples
    --------
    >>> import types
    >>> from spade_fast.compat import TrueOBS, accelerate
    >>> script = types.ModuleType("script")
    >>> script.Solver = type("TrueOBS", (), {})
    >>> accelerate(script)
    ['script.Solver']
    >>> script.Solver is TrueOBS
    True
    """
    if not modules:
        raise ValueError("accelerate() needs the modules that imported the published solver classes; none was given")
    found: list[tuple[ModuleType, str, type]] = []
    for module in modules:
        if not isinstance(module, ModuleType):
            raise TypeError(f"accelerate() takes modules, got {type(module).__name__}: {module!r}")
        solvers = {name: value for name, value in vars(module).items() if _is_solver_class(value)}
        if not solvers:
            raise ValueError(f"module {module.__name__!r} has no class called {' or '.join(_REPLACEMENTS)}")
        for name, published in solvers.items():
            replacement = _REPLACEMENTS[published.__name__]
            if published is not replacement:
                found.append((module, name, replacement))
    for module, name, replacement in found:
        setattr(module, name, replacement)
    return [f"{module.__name__}.{name}" for module, name, _ in found]


def _is_solver_class(value: object) -> bool:
    return isinstance(value, type) and value.__name__ in _REPLACEMENTS
