"""Prints the dependencies that a pyproject.toml names, a line each: what pip installs before the source is there."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["cluster"]]))
