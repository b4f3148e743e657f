"""Fetch GLUE tasks into data/glue/ and pretrained encoders into data/models/.

    python data/download.py rte cola        # GLUE: cola sst2 mrpc stsb qqp mnli qnli rte wnli
    python data/download.py roberta-base    # or owner/name: RoBERTa, BERT or MPNet on Hugging Face

What exists is not fetched again. Models come from huggingface.co, or from $HF_ENDPOINT. MRPC is put
together from SentEval's copy of its sentences and GLUE's list of the pairs in its dev set.
"""

import http.client
import os
import re
import socket
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))  # this file is run as a program

from data import glue, pretrained, tokenizer
from data.command import one_line, parser_of, reading

HUB = "https://huggingface.co"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
ARCHIVES = {"qqp": "QQP-clean", "qnli": "QNLIv2"}  # the others have their folder's name


def get(name, data=DATA):
    """Fetch one task or model unless its folder exists; prints and returns the folder."""
    task = name.lower().replace("-", "")
    if task in glue.TASKS:
        name, fill, folder = task, glue_task, data / "glue" / glue.TASKS[task].folder
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
        fill, folder = hub_model, data / "models" / name
    else:
        raise ValueError(f"{name!r:.100} is neither a GLUE task ({', '.join(glue.TASKS)}) "
                         f"nor the name of a model")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A folder next to it is filled, and renamed when it is complete.
        with tempfile.TemporaryDirectory(".part", f".{folder.name}.", folder.parent) as partial:
            fill(name, Path(partial))
            os.chmod(partial, 0o755)
            os.rename(partial, folder)
    print(folder)
    return folder


def hub_model(name, folder):
    """Fill `folder` with the model's configuration, tokenizer and weights."""
    base = f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{name}/resolve/main"
    pretrained.read_config(fetch(f"{base}/config.json", folder))  # or it raises ValueError
    found = {file for file in tokenizer.FILES if fetch(f"{base}/{file}", folder, needed=False)}
    if not found & {"tokenizer.json", "vocab.txt"} and not found >= {"vocab.json", "merges.txt"}:
        raise OSError(f"{name} has no tokenizer.json, vocab.txt, or vocab.json with merges.txt")
    if not any(fetch(f"{base}/{file}", folder, needed=False) for file in pretrained.WEIGHTS):
        raise OSError(f"{name} has neither {' nor '.join(pretrained.WEIGHTS)}, or does not give it "
                      f"to everyone; sharded weights are not supported")


def glue_task(task, folder):
    """Fill `folder` with the task's train.tsv, dev.tsv and so on."""
    if task == "mrpc":
        sentences = fetch(f"{SENTEVAL}/msr_paraphrase_train.txt", folder)
        dev_ids = fetch(f"{GLUE}/mrpc_dev_ids.tsv", folder)
        split_mrpc(sentences, dev_ids, folder)
        return
    inside = glue.TASKS[task].folder
    archive = fetch(f"{GLUE}/{ARCHIVES.get(task, inside)}.zip", folder)
    with reading(archive.name), zipfile.ZipFile(archive) as zipped:
        zipped.extractall(folder)  # which keeps every member inside `folder`
        for file in list((folder / inside).iterdir()):
            file.rename(folder / file.name)
    (folder / inside).rmdir()
    archive.unlink()


def split_mrpc(sentences, dev_ids, folder):
    """GLUE's train.tsv and dev.tsv: from the corpus's training sentences and the dev pairs' ids."""
    dev = {tuple(line.split("\t")) for line in dev_ids.read_text("utf-8-sig").split("\n")}
    lines = sentences.read_text("utf-8-sig").rstrip("\n").split("\n")
    header, *rows = (line.rstrip("\r") for line in lines)
    parts = {"train": [header], "dev": [header]}
    for row in rows:
        parts["dev" if tuple(row.split("\t")[1:3]) in dev else "train"].append(row)
    for name, lines in parts.items():
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8", newline="\n")


def fetch(url, folder, needed=True):
    """Download `url` into `folder`: its file; None if it is not needed and the server lacks it."""
    if not url.startswith(("https://", "http://")):  # urllib would follow file:// and data:
        raise OSError(f"{url:.100} begins with neither https:// nor http://")
    file = folder / url.rpartition("/")[2]
    socket.setdefaulttimeout(60)
    try:
        with tqdm(desc=file.name, unit="B", unit_scale=True, delay=1, disable=None) as bar:
            def progress(blocks, size, total):
                bar.total = total if total > 0 else None
                bar.update(blocks * size - bar.n)
            urllib.request.urlretrieve(url, file, progress)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) in (401, 403, 404):  # 401: the hub has no such repository
            if not needed:
                return None
            raise OSError(f"{url} not found: check the name") from None
        reason = " ".join((str(error) or repr(error)).split())[:150]
        raise OSError(f"{url}: {reason}; check the connection and run the command again") from None
    return file


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a GLUE task or a model's name")
    with one_line("download.py", "stopped; complete downloads are kept"):
        for name in parser.parse_args(argv).names:
            get(name)


if __name__ == "__main__":
    main()
