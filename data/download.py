"""Fetch GLUE tasks into data/glue/ and pretrained encoders into data/models/.

    python data/download.py rte cola        # GLUE: cola sst2 mrpc stsb qqp mnli qnli rte wnli
    python data/download.py roberta-base    # a RoBERTa, BERT or MPNet model of the Hugging Face hub
    python data/download.py owner/name      # any other of them

What is there already is not fetched again. Models come from huggingface.co, or from $HF_ENDPOINT.
MRPC is put together from its sentences, at SentEval, and GLUE's list of which are its dev set; no
task needs more than this script.
"""

import http.client
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))  # this file is run as a program

from data import glue
from data.command import one_line, parser_of

HUB = "https://huggingface.co"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
ARCHIVES = {"qqp": "QQP-clean", "qnli": "QNLIv2"}  # the others are named as their folders


def get(name, data=DATA):
    """Fetch one task or model, unless it is there; returns its folder."""
    task = name.lower().replace("-", "")
    if task in glue.TASKS:
        name, fill = task, glue_task
        folder = data / "glue" / glue.TASKS[task].folder
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        fill = hub_model
        folder = data / "models" / name
    else:
        raise ValueError(f"{name!r} is neither a GLUE task ({', '.join(glue.TASKS)}) "
                         f"nor the name of a model")
    if folder.exists():
        print(f"{folder} is there already")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Filled under another name, beside it, and renamed when whole.
    with tempfile.TemporaryDirectory(".part", f".{folder.name}.", folder.parent) as partial:
        fill(name, Path(partial))
        os.chmod(partial, 0o755)
        os.rename(partial, folder)
    print(folder)
    return folder


def hub_model(name, folder):
    """Fill `folder` with the model's configuration, tokenizer and weights."""
    base = f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{name}/resolve/main"
    config = fetch_or_fail(f"{base}/config.json", folder)
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{base}/config.json is no JSON object") from None
    if kind not in ("bert", "roberta", "mpnet"):
        raise ValueError(f"{name} is a model of type {repr(kind)[:40]}: "
                         f"this project reads bert, roberta and mpnet")
    for file in ("vocab.json", "merges.txt") if kind == "roberta" else ("vocab.txt",):
        fetch_or_fail(f"{base}/{file}", folder)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        fetch(f"{base}/{file}", folder)  # many models have none
    names = "model.safetensors", "pytorch_model.bin"
    if not any(fetch(f"{base}/{file}", folder) for file in names):
        raise OSError(f"{name} has neither model.safetensors nor pytorch_model.bin")


def glue_task(task, folder):
    """Fill `folder` with the task's train.tsv, dev.tsv and so on."""
    if task == "mrpc":
        sentences = fetch_or_fail(f"{SENTEVAL}/msr_paraphrase_train.txt", folder)
        dev_ids = fetch_or_fail(f"{GLUE}/mrpc_dev_ids.tsv", folder)
        split_mrpc(sentences, dev_ids, folder)
        return
    inside = glue.TASKS[task].folder
    archive = fetch_or_fail(f"{GLUE}/{ARCHIVES.get(task, inside)}.zip", folder)
    unpack(archive, folder)
    archive.unlink()
    for file in (folder / inside).glob("*"):
        file.rename(folder / file.name)


def split_mrpc(sentences, dev_ids, folder):
    """GLUE's train.tsv and dev.tsv: from the corpus's training sentences and the dev pairs' ids."""
    dev_lines = dev_ids.read_text(encoding="utf-8-sig").split("\n")
    dev = {tuple(line.split("\t")) for line in dev_lines}
    lines = sentences.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    header, *rows = (line.rstrip("\r") for line in lines)
    parts = {"train": [header], "dev": [header]}
    for row in rows:
        is_dev = tuple(row.split("\t")[1:3]) in dev
        parts["dev" if is_dev else "train"].append(row)
    for name, lines in parts.items():
        text = "\n".join(lines) + "\n"
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8", newline="\n")


def unpack(archive, folder):
    """Unpack a zip into `folder`.

    Raises ValueError where it is damaged, where a member would land outside of the folder, and
    where it would unpack to more than 50 times its size (text packs 3 to 10 times).
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive.name} is refused: its member {name!r:.60} would "
                                     f"land outside of the folder")
            size = sum(member.file_size for member in zipped.infolist())
            if size > max(50 * archive.stat().st_size, 1 << 20):
                raise ValueError(f"{archive.name} is refused: it would unpack to {size:,} bytes, "
                                 f"more than 50 times its own")
            zipped.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{archive.name} is no whole zip file ({str(error)[:80]}); "
                         f"run the command again") from None


def fetch(url, folder):
    """Download `url` into `folder`; its file, or None where the server has none.

    Raises OSError saying what else went wrong with which URL.
    """
    if not url.startswith(("https://", "http://")):  # urllib would follow file:// and data:
        raise OSError(f"{url:.100} is no address of the web: it begins with neither https nor http")
    file = folder / url.rpartition("/")[2]
    request = urllib.request.Request(url, headers={"User-Agent": "condlora"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer, open(file, "wb") as out:
            expected = answer.length  # None where the server does not say
            with tqdm.wrapattr(out, "write", expected, desc=file.name, disable=None) as bar:
                shutil.copyfileobj(answer, bar, 1 << 20)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):  # the hub says 401 of a repository that is not there
            return None
        reason = " ".join(str(error.reason).split())[:100]
        raise OSError(f"{url}: the server answered {error.code} {reason}") from None
    except (http.client.HTTPException, urllib.error.URLError, TimeoutError,
            ConnectionError) as error:
        reason = getattr(error, "reason", None) or repr(error)
        raise OSError(f"{url}: {reason}; is the network there? run the command again") from None
    size = file.stat().st_size
    if expected and size != expected:
        raise OSError(f"{url}: the connection broke after {size} of {expected} bytes; "
                      f"run the command again")
    return file


def fetch_or_fail(url, folder):
    file = fetch(url, folder)
    if file is None:
        raise OSError(f"{url} is not there: check the name")
    return file


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME",
                        help="a GLUE task, or a model of the Hugging Face hub")
    with one_line("download.py", "stopped; what was whole is kept"):
        for name in parser.parse_args(argv).names:
            get(name)


if __name__ == "__main__":
    main()
