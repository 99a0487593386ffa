"""What the verbs share: flags and --help, config files with overrides, one clear sentence for what is wrong, progress."""

import dataclasses
import difflib
import logging
import os
import pathlib
import re
import runpy
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from launch import guard
from lm.config import Config, Section, left_open, unknown_field
from lm.errors import Preempted, UserError
from lm.files import check_writable, write_json

_ROOT = pathlib.Path(__file__).parent.parent


def run(main: Callable[[list[str]], Any], document: str, takes_config: bool = False, resumes: bool = False) -> None:
    """Parses the command line and calls a verb; what it returns is written to --json=PATH.

    Bad input ends in one sentence on standard error and exit code 1, an interruption in exit code 130, training that stopped
    for SIGTERM in 143. A reader that closes the pipe (`| head`) ends the verb quietly.

    Args:
      main: the verb; gets the overrides ("--config.section.field=value"); what it returns is not written if it is None.
      document: the verb's docstring, which --help prints.
      takes_config: whether overrides make sense.
      resumes: whether the same command goes on where it was interrupted.
    """
    flags.DEFINE_string("json", None, "also write the result to this file, for a program")
    verb = sys.modules["__main__"].__spec__.name if sys.modules["__main__"].__spec__ else sys.argv[0]
    overrides, argv = split_overrides(sys.argv)
    _quiet_logging()
    sys.unraisablehook = _unraisable
    try:
        if any(argument in ("--help", "-h", "-help", "--helpfull", "--helpshort") for argument in argv):
            print(_help(document, takes_config), flush=True)
            return
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, ValueError) as error:
            raise UserError(f"{_flag_error(error)}; --help lists the flags of {verb}") from None
        if rest[1:]:
            raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value, and --help lists those of {verb}")
        if overrides and not takes_config:
            raise UserError(f"{overrides[0].split('=')[0]} is set, but {verb} takes no config; a run's folder has its own")
        if flags.FLAGS.json:
            check_writable(pathlib.Path(flags.FLAGS.json))  # now, not after hours of work
        result = main(overrides)
        if flags.FLAGS.json and result is not None:
            write_json(pathlib.Path(flags.FLAGS.json), result)
        sys.stdout.flush()
    except UserError as error:
        print(f"{verb}: {error}", file=sys.stderr)
        guard.leave(1)
    except Preempted as stop:
        print(
            f"\n{verb}: stopped by SIGTERM after step {stop.step}, which is saved; the same command goes on there",
            file=sys.stderr,
        )
        guard.leave(143)  # as a shell tells of it
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own flush at exit fails again
        sys.exit(141)  # as a shell tells of SIGPIPE
    except KeyboardInterrupt:
        print(f"\n{verb}: interrupted{'; the same command goes on from the last checkpoint' if resumes else ''}", file=sys.stderr)
        guard.leave(130)


def _unraisable(unraisable) -> None:
    """Python drops an interruption that falls into a callback (JAX has one in the garbage collector): here it comes again."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    leaving = threading.Event()

    def interrupt():
        leaving.wait()  # not while this hook still runs, where it would be dropped once more
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    leaving.set()


def _one_line(error) -> str:
    return " ".join(str(error).split())


def _flag_error(error) -> str:
    """What absl says of a bad value, in words for people."""
    text = _one_line(error).replace("invalid literal for int() with base 10:", "must be a whole number, not")
    text = text.replace("could not convert string to float:", "must be a number, not")
    return re.sub(r"\('Non-boolean argument to boolean flag', (.*)\)", r"must be true or false, not \1", text)


def _quiet_logging():
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax tells of every file it opens, and what went wrong it raises as well
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("lm")
    logger.handlers, logger.propagate = [handler], False


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes the overrides of the config out of a command line: "--config.a.b=v", also written with a space."""
    overrides, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.", "--noconfig.")):
            rest.append(argument)
        elif "=" in argument or argument.startswith("--no"):
            overrides.append(argument)
        else:
            overrides.append(f"{argument}={next(arguments, '')}")
    return overrides, rest


def check_data_path(path: str | None) -> None:
    """Raises a UserError if --data_path is given and nothing stands there."""
    if path and not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        raise UserError(f"--data_path={path} does not exist: give a folder with train, valid and test files")


def check_config_given() -> None:
    """Refuses a verb that stands without its --config."""
    if not flags.FLAGS.config:
        raise UserError("--config is missing: give a config file, such as configs/compare/lstm.py, or one of your own")


def load_config(path: str, overrides: list[str]) -> Config:
    """The config that a file's get_config() returns, with overrides; the file's argument follows a colon.

    Args:
      path: such as "configs/compare/lstm.py" or "configs/compare/lstm.py:runlocal=1".
      overrides: "--config.section.field=value"; the value "none" leaves an optional field open.

    Raises:
      UserError: no such file, field or value.
    """
    from ml_collections import config_flags

    config = _get_config(*path.split(":", 1))
    for override in overrides:
        _check_field(_dotted(override))
    overrides = list({_dotted(override): override for override in overrides}.values())  # of a field named twice, the last
    given = [override for override in overrides if not _is_none(override)]
    values, argv = flags.FlagValues(), ["", *given]
    config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = values.config
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(_flag_error(error)) from None
    for override in overrides:
        if override not in given:
            *section, name = _dotted(override).split(".")
            setattr(getattr(config, section[0]) if section else config, name, None)
    return config


def _is_none(override):
    name, _, value = override.partition("=")
    return name.startswith("--config.") and value.lower() == "none"


def _get_config(file, *argument):
    if not os.path.isfile(file):
        raise UserError(f"--config={file} is not a file; {_which_may_be_meant(file)}")
    try:
        module = runpy.run_path(file)
        if "get_config" not in module:
            raise UserError("it defines no get_config()")
        config = module["get_config"](*argument)
    except UserError as error:
        raise UserError(f"--config={file}: {error}") from None
    except Exception as error:  # a config file is a program; whatever is wrong with it is told in its own words
        raise UserError(f"--config={file}: {type(error).__name__}: {_one_line(error)}") from None
    if not isinstance(config, Config):
        raise UserError(f"--config={file}: get_config() must return an lm.config.Config, not {type(config).__name__}")
    return config


def _which_may_be_meant(file):
    known = known_configs()
    inside = [path for path in known if path.startswith(f"{file.removesuffix('/')}/")]
    if inside:
        return f"it holds {', '.join(map(_from_here, inside))}"
    near = difflib.get_close_matches(file, known, 1)
    if near:
        return f"did you mean {_from_here(near[0])}?"
    return f"those of this project stand in {', '.join(sorted({_from_here(os.path.dirname(path)) for path in known}))}"


def known_configs() -> list[str]:
    """The config files of this project, relative to the folder that holds them."""
    return sorted(str(p.relative_to(_ROOT)) for p in (_ROOT / "configs").rglob("*.py") if not p.name.startswith("_"))


def _from_here(path):
    """A path of this project, for who stands in another folder."""
    return os.path.relpath(_ROOT / path)


def _dotted(override):
    return override.lstrip("-").removeprefix("noconfig.").removeprefix("config.").split("=")[0]


def _check_field(dotted):
    section: Any = Config()
    for name in dotted.split("."):
        if not isinstance(section, Section):
            raise UserError(
                f"config.{dotted} does not exist: config.{dotted.rsplit('.', 1)[0]} has no parts; --help lists the fields"
            )
        if name not in type(section).__dataclass_fields__:
            raise UserError(unknown_field(section, name))
        section = getattr(section, name)
    if isinstance(section, Section):
        raise UserError(f"config.{dotted} is a group of fields; set one of them, as in --config.{dotted}.field=value")


def _help(document, takes_config):
    lines = [document.strip(), "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.modules["__main__"]):
        lines.append(
            _entry(f"--{flag.name}={'true|false' if flag.boolean else '…'}", flag.help, None if flag.boolean else flag.default)
        )
    lines.append(_entry("--json=…", flags.FLAGS["json"].help, None))
    if takes_config:
        lines += ["", "Any field of the config can be overridden, as in --config.model.hidden_dim=650; `none` leaves it open:"]
        lines += _fields(Config(), "--config.")
    return "\n".join(lines)


def _entry(name, meaning, default):
    shown = "" if default in (None, "") else f" [{default}]"
    return textwrap.fill(f"{name:<36} {meaning}{shown}", 120, initial_indent="  ", subsequent_indent=" " * 39)


def _fields(section, prefix):
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Section):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            choices = field.metadata["choices"]
            if isinstance(choices, dict):
                choices = dict.fromkeys(name for names in choices.values() for name in names)
            options = f" ({', '.join(choices)})" if choices else ""
            shown = _by_value(left_open(type(section)._section, field.name)) if value is None else value
            yield _entry(f"{prefix}{field.name}", field.metadata["meaning"] + options, shown)


def _by_value(defaults):
    """What stands for a field that is left open: one value for all, or each with what it is for; None: nothing."""
    names = {}
    for name, value in defaults.items():
        names.setdefault(value, []).append(name)
    if len(names) <= 1:
        return next(iter(names), None)
    return "; ".join(f"{', '.join(names[value])}: {value}" for value in names if value is not None)


class ProgressBar:
    """A bar on a terminal, nothing elsewhere; use as a context."""

    def __init__(self, total: int, unit: str, first: int = 0, label: str = ""):
        self._arguments = dict(total=total, unit=unit, initial=first, desc=label or None, leave=False, unit_scale=True)

    def __enter__(self):
        from tqdm import tqdm

        self._bar = tqdm(**self._arguments, disable=not sys.stderr.isatty(), dynamic_ncols=True, mininterval=0.5)
        return self._bar

    def __exit__(self, *_):
        self._bar.close()
