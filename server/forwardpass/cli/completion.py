"""`forwardpass completion bash`: the shell's own script that completes commands, options, choices and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from forwardpass.cli.main import whole_parser
from forwardpass.optional_imports import need

SHELLS: Final = ("bash", "zsh", "fish", "tcsh")
_FOLDERS: Final = ("DIR", "FOLDER", "REPOSITORY")  # metavars of folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)
    parser.epilog = 'bash: eval "$(forwardpass completion bash)" in ~/.bashrc; zsh: > a file _forwardpass in $fpath.'


def run(args: argparse.Namespace) -> int:
    """Print the script. Raises ForwardpassError where shtab is not installed."""
    shtab = need("shtab", "completion")
    parser = whole_parser()
    for action in _actions(parser):
        if action.type is Path or action.dest in ("repository", "input"):
            is_folder = str(action.metavar) in _FOLDERS or action.dest == "repository"
            action.complete = shtab.DIRECTORY if is_folder else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
