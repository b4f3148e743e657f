"""Runs the README's commands and Python blocks, in order, in a fresh clone; checks its links.

    python tests/readme.py

Lines marked "# GPU" or "# network" are left out, and `pip install`. A small folder of data and a
file of lines stand in for the reader's own.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(name, command, clone):
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    print("ok    " if done.returncode == 0 else "FAILED", name, flush=True)
    if done.returncode:
        print(done.stdout[-500:], done.stderr[-500:])
    return done.returncode == 0


def main():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    passed = []
    for link in re.findall(r"\]\(([^)h][^)]*)\)", text):
        passed.append((ROOT / link).exists())
        if not passed[-1]:
            print("no file", link)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        (clone / "lines.txt").write_text("one text\tanother text\n")
        parts = re.findall(r"```python\n([\s\S]*?)```|^    ((?:python|pip) .*)$|"
                           r"`(python (?:train|analyze).py .*?)`", text, re.M)
        for block, line, exercise in parts:
            line = line or exercise
            if re.search(r"# (GPU|network)", line) or "pytest" in line:
                continue
            if block:
                if "..." not in block:  # an excerpt of condlora.py
                    passed.append(run("python block", [sys.executable, "-c", block], clone))
                continue
            command = line.split(" && ")[-1].split(" # ")[0]
            command = re.sub("^python", sys.executable, command)
            passed.append(run(command.partition(" ")[2], ["bash", "-c", command], clone))
    print(f"{sum(passed)} of {len(passed)} links and commands hold")
    sys.exit(0 if all(passed) and len(passed) > 20 else 1)


if __name__ == "__main__":
    main()
