"""The verbs of the command line: one module each, imported only when it is asked for.

A verb is `main(argv) -> exit code`. It gets the words after its name, composes a configuration from them
and calls the packages that do the work; it holds no logic of its own. This file must import nothing slow.
"""

from mmtrain.verbs.help import HELP, VERBS

__all__ = ["HELP", "VERBS"]
