"""Finding the user's reward by name: in a module or in a file. Knows nothing about what rewards are asked."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from textrl_swarm.errors import ConfigError, closest
from textrl_swarm.rewards.functions import SentenceReward, StepReward, is_sentence_reward
from textrl_swarm.rewards.isolation import OwnSettings, keep_settings


def load_reward(spec: str) -> StepReward | SentenceReward:
    """The callable behind "package.module:name" or "path/to/file.py:name".

    Modules are looked for in the current directory first; a file may import its neighbours. Process-wide
    settings that the module changes hold in the reward's calls only, see `OwnSettings`.

    Raises:
        ConfigError: no such module, file or name (with the closest there is), it cannot be imported, or it is
            no reward.
    """
    place, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or not place or not name:
        raise ConfigError(f'a reward is named "module:function" or "path/to/file.py:function", got {spec!r}')
    is_file = place.endswith(".py") or "/" in place
    settings = OwnSettings()
    with settings.in_use():
        module = _import_file(Path(os.path.expanduser(place))) if is_file else _import_module(place)
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{place} has no {name!r}; {closest(name, known)}")
    reward = getattr(module, name)
    is_sentence_reward(reward)
    keep_settings(reward, settings)
    return reward


def _import_module(name: str) -> ModuleType:
    here = Path.cwd()
    try:
        with _neighbours(here):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            near = _near(name, [path.stem for path in here.glob("*.py")])
            raise ConfigError(
                f"there is no module {error.name!r} here ({here}) or among the installed packages{near}"
            ) from error
        raise ConfigError(f"importing {name} failed: {error!r}") from error
    except (Exception, SystemExit) as error:  # scripts end with sys.exit
        raise ConfigError(f"importing {name} failed: {error!r}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = _near(path.name, [found.name for found in path.parent.glob("*.py")])
        raise ConfigError(f"there is no file {path} ({Path.cwd()} is the current directory){near}")
    spec = importlib.util.spec_from_file_location(f"textrl_swarm_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None, (
        "the file exists and ends with .py, or was named with a /"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        with _neighbours(path.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ConfigError(f"importing {path} failed: {error!r}") from error
    return module


@contextlib.contextmanager
def _neighbours(directory: Path) -> Iterator[None]:
    """Puts a directory's modules first during an import, as with `python -m`.

    From then on they come last, for imports inside functions.
    """
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(str(directory))
        if str(directory) not in sys.path:
            sys.path.append(str(directory))


def _near(name: str, known: Sequence[str]) -> str:
    return f"; {closest(name, known)}" if known else ""
