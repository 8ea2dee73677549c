"""`mmtrain VERB [settings]`: finds the verb, imports it alone, and turns mistakes into one sentence.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 128 + number ended by a signal (130: Ctrl-C).
"""

import contextlib
import errno
import importlib
import keyword
import os
import signal
import sys
import threading
from collections.abc import Iterator

from mmtrain import __version__
from mmtrain.config.errors import UserError
from mmtrain.verbs.help import CONFIGURED, HELP, OF_A_RUN, VERBS


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _ending_cleanly():
            return _dispatch(arguments)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        return _fail(f"interrupted ({number.name})", 128 + number)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; nothing is left to say, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sentence = _disk_sentence(error)
        if sentence is None:
            raise
        return _fail(sentence, 2)


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end a verb as Ctrl-C does: with all that it does at its end (`train` has its own way)."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("--help", "-h", "help"):
        print(overview(), end="")
        return 0
    if verb == "--version":
        print(f"mmtrain {__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(_unknown_verb(verb))
    rest = arguments[1:]
    if "--help" in rest or "-h" in rest:
        print(HELP[verb], end="")
        return 0
    rest = _take_config_dir(rest)
    if verb in CONFIGURED:
        rest, wants_config = _take_cfg(rest)
        if wants_config:
            return _print_config(verb, rest)
    module = f"{verb}_" if keyword.iskeyword(verb) else verb
    return importlib.import_module(f"mmtrain.verbs.{module}").main(rest)


def overview() -> str:
    """What `mmtrain --help` prints."""
    lines = [f"  {name:<11}{line}" for name, line in VERBS.items()]
    return (
        f"mmtrain {__version__}: pretrain multimodal token models, every FLOP booked\n\n"
        "mmtrain VERB [KEY=VALUE ...]\n\n" + "\n".join(lines) + "\n\n"
        "mmtrain VERB --help   explains the verb, with an example\n"
        "mmtrain VERB --cfg job   prints the resolved configuration\n\n"
        "Start here:  mmtrain doctor;  mmtrain train experiment=quickstart;  mmtrain report\n"
    )


def _unknown_verb(verb: str) -> str:
    import difflib

    close = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean `mmtrain {close[0]}`?" if close else f"there is {', '.join(VERBS)}"
    return f"{verb!r} is not a verb; {hint}"


def _take_config_dir(arguments: list[str]) -> list[str]:
    """Remove `--config-dir DIR` and hand DIR to this process and those it starts."""
    from mmtrain.config.listing import CONFIG_DIR_VARIABLE, search_path

    rest, folder = _take_option(arguments, "--config-dir")
    if folder is not None:
        os.environ[CONFIG_DIR_VARIABLE] = os.path.abspath(os.path.expanduser(folder))
        search_path()
    return rest


def _take_cfg(arguments: list[str]) -> tuple[list[str], bool]:
    rest, what = _take_option(arguments, "--cfg")
    if what not in (None, "job"):
        raise UserError(f"--cfg {what}: only `--cfg job` exists; it prints the resolved configuration")
    return rest, what is not None


def _take_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """`arguments` without `name VALUE` or `name=VALUE`, and VALUE."""
    rest: list[str] = []
    value: str | None = None
    words = iter(arguments)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name} needs a value after it; see `mmtrain --help`")
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, value


def _print_config(verb: str, arguments: list[str]) -> int:
    """Print the configuration that a verb would use; words without `=` (`tokenizer image`) are no settings."""
    from pathlib import Path

    from mmtrain.config.compose import compose, load_frozen, to_yaml, with_overrides

    settings = [word for word in arguments if "=" in word or word.startswith("-")]
    if verb in OF_A_RUN:
        given = {word.partition("=")[0]: word.partition("=")[2] for word in settings}
        if given.get("run"):
            folder = Path(given["run"])
        elif "experiment" in given or "name" in given:
            config = compose(settings)
            folder = Path(config.root, config.name)
        else:
            root = Path(given.get("root", "runs"))
            folder = root / (root / "last").read_text().strip() if (root / "last").is_file() else root
        if (folder / "config.yaml").is_file():
            settings = [
                word for word in settings if word.partition("=")[0] not in ("run", "root", "experiment", "name")
            ]
            print(to_yaml(with_overrides(load_frozen(folder / "config.yaml"), settings)), end="")
            return 0
    print(to_yaml(compose(settings)), end="")
    return 0


def _disk_sentence(error: OSError) -> str | None:
    """One sentence for the faults of a disk that the user can mend; None for another fault."""
    place = f" while writing {error.filename}" if error.filename else ""
    elsewhere = "choose another place with root=DIR and data_dir=DIR"
    if error.errno == errno.ENOSPC:
        return f"the disk is full{place}; free some space, or {elsewhere}"
    if error.errno == errno.EDQUOT:
        return f"your disk quota is used up{place}; free some space, or {elsewhere}"
    if error.errno == errno.EROFS:
        return f"the file system is read-only{place}; {elsewhere}"
    return None


def _fail(sentence: str, code: int) -> int:
    if os.environ.get("MMTRAIN_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    print(f"mmtrain: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
