"""What every command line does: options, one-line errors, atomic writes."""

import argparse
import os
import pickle
import sys
from contextlib import contextmanager


def parser_of(doc, usage=None):
    """A parser whose --help shows a file's docstring, and whose errors are ValueErrors."""
    parser = argparse.ArgumentParser(description=doc, usage=usage, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):  # without the usage
        raise ValueError(message[:250])
    parser.error = error
    return parser


@contextmanager
def one_line(program, stopped="stopped"):
    """A mistake in this block ends the program with a line on standard error and exit status 2."""
    # A terminal that knows fewer characters gets "?" for the others.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        return sys.stdout.flush()  # here, and not as Python exits
    except BrokenPipeError:  # whoever read the output has enough of it
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        message = str(error)
        if getattr(error, "filename", None):  # Python's "[Errno 2] ..."
            message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        message = stopped
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def reading(file):
    """Whatever goes wrong in this block becomes a ValueError that names `file`, in one short line.

    FileNotFoundError passes, and so does a ValueError that begins with the file's name. If `file`
    is None, everything passes.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if file is None or (type(error) is ValueError and str(error).startswith(str(file))):
            raise
        reason = (str(error).splitlines() or [""])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch.load's text advises to run its code
            reason = "not a PyTorch file of plain tensors"
        elif type(error) is not ValueError:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{file}: {reason:.200}") from error


def write(file, data):
    """Write bytes next to `file`, then rename: an interrupted run leaves the file as it was."""
    partial = partial_of(file)
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error.strerror}") from None


def check_outputs(outputs):
    """Raise ValueError now if `write` could not write one of {option: (file or None, mark)} later.

    Only a file that is empty or has `mark` in its first 100 bytes is replaced, and none in a
    pretrained model's folder.
    """
    taken = set()
    for option, (file, mark) in outputs.items():
        if not file:
            continue
        reason = "it is also another output" if file.resolve() in taken else None
        taken.add(file.resolve())
        try:
            start = file.open("rb").read(100) if file.is_file() else b"other"
            is_ours = not start or mark in start
            if file.exists() and (not is_ours or any(file.parent.glob("*config.json"))):
                reason = "it is another kind of file, or part of a model's folder"
            partial_of(file).write_bytes(b"")
            partial_of(file).unlink()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
        if reason:
            raise ValueError(f"{option} {str(file)[:150]} cannot be written: {reason}")


def partial_of(file):
    return file.with_name(file.name + ".condlora.part")
