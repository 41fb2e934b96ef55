"""How every script starts, and how it ends: one line for bad input, never a traceback."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

from absl import app, flags, logging

from jfi.errors import InputError, VerificationError
from jfi.hardware import tuning
from nets import NetError

HELP = {"-h", "-help", "--help", "-helpshort", "--helpshort"}
PLACEHOLDERS = {"string": "TEXT", "int": "N", "float": "X"}
WIDTH = 100  # of the help
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def start(script: ModuleType) -> None:
    """Run a script that is a module of a room, under whatever name it was started by."""
    script.define_flags()
    run(script.main, doc=script.__doc__)


def run(main: Callable[..., int | None], positional: bool = False, doc: str | None = None) -> None:
    """Parse the flags, run `main`, exit with its status (None is 0).

    Args:
      positional: `main` takes the list of arguments that are no flags; else there are none.
      doc: what --help begins with; by default the docstring of the script that was started.

    Bad flags and bad input print `error: ...` on standard error and exit with 2, a failing system
    call (a full disk) with 1, an interrupt with 130. Any other exception is a defect and keeps
    its traceback.
    """
    app.run(
        lambda argv: _guard(partial(main, argv[1:]) if positional else main),
        flags_parser=partial(_parse, positional=positional, doc=doc),
    )


def fail(error: object, status: int = FAILED) -> int:
    """Print the error as one line on standard error; the exit status for `main` to return."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return status


def _guard(main: Callable[[], int | None]) -> int | None:
    try:
        tuning.keep_compiled()
        return main()
    except (InputError, NetError) as error:
        return fail(error, BAD_INPUT)
    except (OSError, VerificationError) as error:
        return fail(error)
    except KeyboardInterrupt as error:
        return fail(str(error) or "interrupted", INTERRUPTED)


def _parse(argv: list[str], positional: bool = False, doc: str | None = None) -> list[str]:
    """The flags parser of absl, with our error line, exit status and help."""
    if HELP & set(argv[1:]):
        print(help_text(doc))
        sys.exit(0)
    flags.FLAGS.verbosity = logging.WARNING  # else JAX tells of every backend it tries
    flags.FLAGS.set_gnu_getopt(True)  # flags may stand behind other arguments
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(fail(error, BAD_INPUT))
    if len(rest) > 1 and not positional:
        sys.exit(fail(f"argument {rest[1]!r} is unknown; flags start with --", BAD_INPUT))
    return rest


def help_text(doc: str | None = None) -> str:
    """The script's docstring and every flag that it and its modules of `experiments` define."""
    doc = (doc or sys.modules["__main__"].__doc__ or "").strip()
    # absl files the flags of a script under the name it was started by.
    known = [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module == sys.argv[0] or module.startswith("experiments.")
        for flag in defined
    ]
    return "\n".join([doc, "", "Flags:", *map(_flag_help, known)])


def _flag_help(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, "") or flag.boolean else f" (default: {flag.default})"
    # absl puts the choices of an enumeration in front of its text; they stand behind the name.
    text = flag.help.split(">: ", 1)[-1] if _choices(flag) else flag.help
    usage = f"{_usage(flag)}{default}"
    if len(usage) > WIDTH - 2:
        # A long choice goes on below, cut between its names.
        usage = flags.text_wrap(usage.replace("|", "| "), WIDTH, "        ", "").replace("| ", "|")
    return f"  {usage}\n" + flags.text_wrap(text, WIDTH, "      ")


def _usage(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--[no]{flag.name}"
    value = "|".join(_choices(flag)) or PLACEHOLDERS.get(flag.flag_type(), "VALUE")
    return f"--{flag.name}={value}"


def _choices(flag: flags.Flag) -> list[str]:
    return getattr(flag.parser, "enum_values", [])
