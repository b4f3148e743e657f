"""What the command lines share: help, one line for a mistake, and files that are written whole."""

import argparse
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path


def parser_of(doc):
    """A parser whose --help shows a file's docstring, and whose errors are ValueErrors."""
    intro, _, rest = doc.partition("\n")
    parser = argparse.ArgumentParser(description=intro, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):  # without the usage
        raise ValueError(message[:250])
    parser.error = error
    return parser


def between(kind, low, high):
    """A type for a parser: an int or a float in a range."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r:.40} is no {what} from {low} to {high}")
        return value
    return parse


@contextmanager
def one_line(program, stopped="stopped"):
    """A mistake in this block ends the program with a line on standard error and exit status 2."""
    message = None
    try:
        yield
        sys.stdout.flush()  # here, and not as Python exits
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = stopped
    if message is not None:
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def naming(file):
    """Put `file`, if there is one, before the message of an error in this block."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if not file:
            raise
        raise ValueError(f"{file}: {error}") from None


def write(file, data):
    """Write bytes beside `file`, then rename that: a stopped run leaves the last whole one."""
    partial = beside(file)
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error.strerror}") from None


def check_writable(file, option, mark):
    """Raise ValueError now where `write` could not write what `option` names.

    Or where it would replace a file of another kind: ours have the bytes `mark` near the beginning.
    """
    try:
        if file.exists():
            if not file.is_file():
                raise ValueError("it is no file")
            with open(file, "rb") as there:
                begin = there.read(500)
            if begin and mark not in begin:
                raise ValueError("a file of another kind is there")
        beside(file).write_bytes(b"")
        beside(file).unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{option} {str(file)[:150]} cannot be written: {reason}") from None


def beside(file):
    return file.with_name(file.name + ".condlora.part")
