"""`mmtrain ls [GROUP]`: every choice with one line."""

import shutil
import textwrap

from mmtrain.config.errors import UserError
from mmtrain.config.listing import groups, summary
from mmtrain.config.suggest import did_you_mean, nearest

ORDER = ("experiment", "model", "corpus", "task", "engine", "objective", "retrieval", "image_tokenizer")


def main(argv: list[str]) -> int:
    """Print the groups named in `argv` (all of them when it is empty)."""
    found = groups()
    for name in argv:
        if name not in found:
            close = nearest(name, found)
            raise UserError(
                f"{name} is not a group; " + (did_you_mean(close) if close else f"there is {', '.join(found)}")
            )
    wanted = argv or sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    width = max(len(option) for name in wanted for option in found[name])
    columns = max(shutil.get_terminal_size().columns, 60)
    for position, name in enumerate(wanted):
        print(("\n" if position else "") + f"{name}=")
        for option, path in found[name].items():
            indent = f"  {option:<{width}}  "
            print(textwrap.fill(summary(path), columns, initial_indent=indent, subsequent_indent=" " * len(indent)))
    return 0
