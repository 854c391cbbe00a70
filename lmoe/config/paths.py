"""Paths in a configuration: all treated alike."""

import os
import stat

from lmoe.command import at_home
from lmoe.config.sections import Config

PATHS = ("job.folder", "data.paths", "data.tokenizer", "data.cache", "checkpoint.load")
FOLDERS = ("job.folder", "data.cache", "checkpoint.load")  # where they are there


def check_path(key: str, path: str) -> str:
    """Refuse a path that can be none, with `~` replaced."""
    path = at_home(f"{key} = {path!r}", path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return path
    except OSError as error:
        raise ValueError(f"{key} = {path!r}: {error.strerror}") from None
    if key in FOLDERS and not stat.S_ISDIR(mode):
        raise ValueError(f"{key} = {path!r} is no folder; remove it, or name another")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ValueError(f"{key} = {path!r} is a pipe or a device, no file or folder")
    return path


def check_paths(config: Config) -> None:
    """Check every path, and replace a leading `~`."""
    for name in PATHS:
        section, key = name.split(".")
        options = getattr(config, section)
        value = getattr(options, key)
        if key == "paths":
            if "" in value:
                raise ValueError(f"{name} = {value!r} names an empty path; leave it out")
            setattr(options, key, [check_path(name, path) for path in value])
        elif value:
            setattr(options, key, check_path(name, value))
        elif name == "job.folder":
            raise ValueError("job.folder is empty: name a folder, . for the one at hand")
