"""What all commands share: their help, and one clear line where something has to change.

@command(__doc__)
def main(arguments: list[str]) -> None: ...

sys.exit(main(sys.argv[1:]))
"""

import functools
import sys
from collections.abc import Callable


class Complaint(Exception):
    """Something that whoever called can change. The message is one line that says what to do."""


class Help(Exception):
    """The arguments are not ones that the command knows: its help says which are."""


def command(text: str, least: int = 1) -> Callable[[Callable], Callable[[list[str]], int]]:
    """Makes `main(arguments)` return an exit code: what it returns itself, or 0; 2 for a Complaint or an OSError,
    printed as one line, and for its help, `text`, where there are fewer than `least` arguments."""

    def wrap(work: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
        @functools.wraps(work)
        def main(arguments: list[str]) -> int:
            try:
                if len(arguments) < least or arguments[:1] in (["-h"], ["--help"]):
                    raise Help
                return work(arguments) or 0
            except Help:
                print(text)
                return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
            except (Complaint, OSError) as error:
                print(f"error: {first_line(error)}", file=sys.stderr)
                return 2

        return main

    return wrap


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
