"""The command line: its commands, one module a group; every failure as one line and an exit code. Heavy imports wait
inside the commands."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from autosam3d.cli import pacs, slicewise
from autosam3d.cli.console import LogToStderr, give_up_stderr, one_line, open_streams
from autosam3d.cli.datasets import phantom, prepare
from autosam3d.cli.demo import demo
from autosam3d.cli.evaluate import evaluate
from autosam3d.cli.export import export, export_web, pack, verify
from autosam3d.cli.home import settle_home
from autosam3d.cli.inspect import bench, info, recipes
from autosam3d.cli.moved import remedy_for
from autosam3d.cli.nnunet import nnunet
from autosam3d.cli.reproduce import reproduce
from autosam3d.cli.segment import segment
from autosam3d.cli.serve import serve
from autosam3d.cli.train import distill, train
from autosam3d.errors import AutoSam3dError
from autosam3d.inference.out_of_memory import ran_out_of_memory
from autosam3d.version import __version__

app = typer.Typer(
    name="autosam3d",
    help="Automatic 3D multi-organ CT segmentation from SAM. Not a medical device.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Typer's own name for it differs between versions: click's class, or one of a copy inside Typer.
_CommandLineError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

# What the operating system says of a path that cannot be.
_NO_SUCH_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, handlers=[LogToStderr(debug)])
    logging.getLogger("autosam3d").setLevel(logging.INFO if verbose or debug else logging.WARNING)
    logging.captureWarnings(True)
    if version:
        typer.echo(f"autosam3d {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


for _command in (train, distill, segment, evaluate, prepare, info, bench, recipes, pack, export, verify, phantom, demo,
                 reproduce, nnunet, export_web, serve):
    app.command(_command.__name__.replace("_", "-"))(_command)
for _group in (slicewise.app, pacs.app):
    app.add_typer(_group)


def main() -> None:
    """Run the command line; every failure ends as one line on stderr and its exit code."""
    open_streams()
    atexit.register(give_up_stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Ends by an exception, so that files half written are removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    settle_home()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]  # wherever it stands
    code: Any = 0
    try:
        code = app(arguments, standalone_mode=False)
    except AutoSam3dError as error:
        _fail(f"error[{error.code}] {error}", error.exit_code, error if debug else None)
    except typer.Abort:
        code = 130
    except _CommandLineError as error:
        fault = error.format_message().rstrip(".")
        _fail(f"error[USAGE] autosam3d: {fault}; {_remedy(error)}", 2, error if debug else None)
    except (MemoryError, RuntimeError, ImportError) as error:
        # Libraries are imported, and threads started, all along the way of a command.
        if not ran_out_of_memory(error):
            raise
        _fail("error[MEMORY] autosam3d: the memory that this process may use has run out; give a smaller scan or a "
              "smaller batch, or use a machine with more memory", 5, error if debug else None)
    except OSError as error:
        _fail_by_system(error, debug)
    except SystemExit as leave:
        # 1 is typer's word for a reader of stdout that has gone, as in `| head`: the code of SIGPIPE.
        code = 141 if leave.code == 1 else leave.code
    if code == 130:
        _fail("stopped", 130, None)
    sys.exit(code if isinstance(code, int) else 0)


def _remedy(error: Any) -> str:
    """What to do about a command line that click refuses."""
    names, context = [], error.ctx
    while context is not None and context.parent is not None:
        names, context = [context.info_name, *names], context.parent
    return remedy_for(" ".join(names), getattr(error, "option_name", "")) or "see autosam3d --help"


def _fail_by_system(error: OSError, debug: bool) -> None:
    """What the operating system refused at a place where nobody expected it."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        # As `io.open_files` says it, which cannot be imported any more.
        _fail(f"error[OPEN_FILES] {error.filename or 'autosam3d'}: cannot be opened: this process has reached its "
              "limit of open files; raise it (`ulimit -n 4096`) and give the same command again", 5,
              error if debug else None)
    reason = (error.strerror or str(error)).lower()
    if error.filename is None and sys.stdout is not None:
        # Printing has failed: what is left is not tried again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if error.filename is not None and error.errno in _NO_SUCH_PATH:
        _fail(f"error[PATH] {error.filename}: {reason}; check the path", 2, error if debug else None)
    _fail(f"error[IO] {error.filename or 'autosam3d'}: {reason}; check the disk and try again", 5,
          error if debug else None)


def _fail(line: str, code: int, error: BaseException | None) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        if error is not None:
            import traceback

            traceback.print_exception(error)
        sys.stderr.write(one_line(line) + "\n")
    sys.exit(code)
